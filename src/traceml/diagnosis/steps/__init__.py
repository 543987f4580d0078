"""Steps of all ranks as arrays: the window, its split into own work and waiting, and estimates from it.

`step_split` is also used by readers and deliveries. Imports `diagnosis.facts` and `database`.
"""
