"""Domain-aligned text-based person retrieval: given a sentence, rank a gallery of pedestrian crops.

The method, in reading order; each file's docstring says what to read next:

    config.py             presets of the models, recipes of training, the flags of the scripts
    data/                 images, one record type, views, words, tokens, batches
    group.py              how a step or a search is shared out
    layers.py             the one attention, the MLPs, one block for each norm order
    encoders.py           image, text and fusion encoder
    losses.py             contrastive, matching and masked-word losses as pure functions
    retriever.py          MRA: the encoders, the heads and the loss terms of one batch
    ranking.py            two-stage search and its metrics
    diffusion/            DaD: images that look as if the target's cameras had taken them

Beside the method stand formats/, town/, weights/, run/ and show/, which it never imports.

Shape letters; a docstring explains any other. Masks are `keep` or end in `_keep`, True = use it:

    B batch      N patches    T tokens of a text   P tokens of a phrase   M positions picked, as of masked words
    D width      E embedding  S keys attended      V vocabulary           H x W pixels
    in ranking.py: Q queries    G gallery images   K candidates of a query, the first k of them re-scored
    in run/contrastive.py: N pairs of all members             R x C a tile
    in diffusion/: C channels   h x w pixels of the latents   K noise levels

Public: `mra.losses.contrastive`, `mra.ranking.retrieval_metrics`, `mra.diffusion.ddim`, `mra.diffusion.dpm_solver`.
Paper: "MRA" is arXiv 2507.10195; its sections are cited where a line implements them.
"""
