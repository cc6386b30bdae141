"""How long the Triton kernels take on a GPU, predicted without one: not a measurement.

    svitt bench --predict h100

Ops run on the CPU up to what they would launch (`launches`), which is compiled for the card
(`facts`) and disassembled (`code`). How often loops turn follows from grids, shapes and layouts
(`steps`); what the card does a clock is published (`cards`); which limit binds is arithmetic
(`model`). So a changed kernel, tile or layout changes its prediction, and nothing is typed in.
"""
