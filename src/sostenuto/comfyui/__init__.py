"""The node pack for ComfyUI; the folder for its ``custom_nodes`` is ``comfyui/comfyui-sostenuto`` in the repository."""

from sostenuto.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
