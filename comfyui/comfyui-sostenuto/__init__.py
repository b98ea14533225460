"""What ComfyUI finds in its ``custom_nodes``: the nodes of the installed package."""

try:
    from sostenuto.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:
    raise ImportError(
        "the sostenuto nodes need the package sostenuto in ComfyUI's Python: python -m pip install sostenuto"
    ) from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
