"""The demonstration behind `ow demo`: SFT and SDFT of one small model on one skill, compared.

`study` and `smollm2` can be imported without torch; `evaluation` needs the `train` extra, `figure`
the `plot` extra.
"""
