"""Score against bytes: MoSEs at several densities beside the LoRA that a user would take instead.

Rule of the search of rates, written before it ran. All is scored on `eval`, with tasks in a row and
`--test ends`. tiny-llm: trace-mini, eight tasks, 100 steps each, seeds 0 and 1, density 0.01.
SmolLM2: its four tasks of the search (C-STANCE, FOMC, ScienceQA, NumGLUE-ds), 100 steps each, seed
0, density 0.003. Rates 3e-3, 5e-3 (tiny-llm alone), 1e-2 and 2e-2 (tiny-llm alone), each with a
spread of the new scores of 0.01 and of 0.001. One pair of rate and spread becomes the default of
both bases: the one with the largest sum of the two OPs among those that both bases ran. The LoRAs
get the best rate of 1e-3, 3e-3, 5e-3, 1e-2 and 2e-2 for each rank and base, so they are never worse
off than MoSEs.

Rule of the search of the density, written before it ran: with that pair, densities 0.003, 0.006,
0.01, 0.015, 0.02 and 0.03 on tiny-llm (`eval`, seeds 0 and 1). The default is the smallest whose OP
is at most one point below the best one's.
"""
