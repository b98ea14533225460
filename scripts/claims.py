"""What the papers' tables say, as pairs of rows of ``benchmarks/papers.py``: the first is said to have the lower distance."""

Claim = tuple[str, str, str]
"""The claim with the paper's numbers (FID), the row that is said to be better, and the one that is said to be worse."""

EQUAL = "= "
"""Begins a claim that two rows are alike."""

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "table1": (
        ("EB-Cache at 1.5× is better than uncached: 3.06 against 3.69", "EB-Cache 1.5×", "uncached"),
        ("… than 33 steps: 4.65", "EB-Cache 1.5×", "33 steps"),
        ("… than FORA: 8.45", "EB-Cache 1.5×", "FORA N=2"),
        ("… than DiTFastAttn: 5.66", "EB-Cache 1.5×", "DiTFastAttn"),
        ("… than L2C: 3.73", "EB-Cache 1.5×", "L2C θ=0.1"),
        ("scaling alone helps: 3.39 against 3.69", "ε-scaling alone", "uncached"),
        ("33 steps are better than FORA: 4.65 against 8.45", "33 steps", "FORA N=2"),
        ("EB-Cache at 2.5× is better than 20 steps: 10.28 against 15.92", "EB-Cache 2.5×", "20 steps"),
        ("… than FORA: 88.21", "EB-Cache 2.5×", "FORA N=3"),
        ("… than ToCa: 13.77", "EB-Cache 2.5×", "ToCa N=4"),
        ("EB-Cache's scaling helps ToCa: 13.10 against 13.77", "ToCa N=4 | EB scaling", "ToCa N=4"),
    ),
    "table1-250": (
        ("EB-Cache at 1.5× is better than 165 steps: 2.27 against 2.36", "EB-Cache 1.5×", "165 steps"),
        ("… than FORA: 2.41", "EB-Cache 1.5×", "FORA N=2"),
        ("… than DiTFastAttn: 2.52", "EB-Cache 1.5×", "DiTFastAttn"),
        ("EB-Cache at 2.5× is better than 100 steps: 2.40 against 2.57", "EB-Cache 2.5×", "100 steps"),
        ("… than FORA: 3.46", "EB-Cache 2.5×", "FORA N=3"),
        ("… than ToCa: 2.52", "EB-Cache 2.5×", "ToCa N=4"),
        ("EB-Cache's scaling helps ToCa: 2.43 against 2.52", "ToCa N=4 | EB scaling", "ToCa N=4"),
    ),
    "table2": (
        ("EB-Cache is better than uncached: 3.41 against 3.48", "EB-Cache", "uncached"),
        ("… than 16 steps: 4.66", "EB-Cache", "16 steps"),
        ("… than ToCa: 4.17", "EB-Cache", "ToCa N=2"),
        ("… than DiTFastAttn: 4.09", "EB-Cache", "DiTFastAttn"),
        ("… than Δ-DiT: 3.97", "EB-Cache", "Δ-DiT N=2"),
        ("… than L2C: 3.46", "EB-Cache", "L2C θ=0.1"),
        ("L2C is better than 16 steps: 3.46 against 4.66", "L2C θ=0.1", "16 steps"),
    ),
    "table5": (
        ("the best b, 0.955, is better than fewer steps: 3.06 against 4.65", "b = 0.955", "33 steps"),
        ("… than 0.945: 3.35", "b = 0.955", "b = 0.945"),
        ("… than 0.965: 3.42", "b = 0.955", "b = 0.965"),
        ("scaling helps (FEB-Cache: 3.05 against 4.12 without)", "b = 0.955", "b = 1"),
    ),
    "table6": (
        ("rising with the noise is better than constant: 2.27 against 2.31", "rising with noise", "constant"),
        ("… than falling: 2.43", "rising with noise", "falling with noise"),
    ),
    "table7": (
        ("0.05 + 0.15 τ is better than 0.10 + 0.05 τ: 2.27 against 2.32", "0.05 + 0.15 τ", "0.10 + 0.05 τ"),
        ("… than 0 + 0.25 τ: 2.35", "0.05 + 0.15 τ", "0.00 + 0.25 τ"),
    ),
    "eb": (
        ("scaling alone helps (Epsilon Scaling: 3.39 against 3.69)", "scale alone", "uncached"),
        ("both together are better than uncached: 3.06", "both", "uncached"),
        ("… than the table alone", "both", "table alone"),
        ("reuse belongs to the noisy steps", "both", "both, table backwards"),
    ),
    "feb": (
        ("b(τ) alone helps: 3.61 against 3.69", "b(τ) alone", "uncached"),
        ("the table alone costs: 4.12 against 3.69", "uncached", "table alone"),
        ("both together are better than uncached: 3.05", "both", "uncached"),
        ("… than the table alone", "both", "table alone"),
        ("b(τ) helps the table more than a constant b", "both", "both, constant b"),
        ("separate stages help: 16.67 against 18.19, with 10 DDIM steps", "DDIM: stages apart", "DDIM: no stages"),
        ("… the same with 50 DDPM steps", "stages apart", "no stages"),
    ),
    "duca": (
        ("conservative steps between aggressive ones help", "DuCa N=4, random", "full and aggressive"),
        ("DuCa is better than FORA: 2.88 against 3.55, both with N = 3", "DuCa N=4, random", "FORA N=3"),
        (
            "aggressive steps among the conservative ones are better than those alone: 2.85 against ToCa's 3.04",
            "DuCa N=4, random",
            "full and conservative (ToCa N=4)",
        ),
        (EQUAL + "random tokens are as good as important ones", "DuCa N=4, random", "DuCa N=4, attention"),
    ),
    "ab": tuple(
        (f"a combination of two outputs is better than the last one, every {n}", f"k=2, every {n}", f"k=1, every {n}")
        for n in (2, 3, 4)
    ),
}
