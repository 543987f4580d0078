"""Parts of the step that cost all ranks: data and copies, the script's own code, and saving.

`phase_cost` has what a part costs and its line; `data_bound`, `own_code` and `saving` the findings. Runs in every
reader. May import what `diagnosis.rules` may.
"""
