"""Domain-aligned text-based person retrieval: given a sentence, rank a gallery of pedestrian crops.

Read in this order; each file's docstring says what comes before and after.

    config.py             presets, recipes, the command line
    data/people.py        identities as sets of attributes, and their words
    data/drawing.py       a person drawn as the camera of a domain sees them
    data/town.py          the drawn data sets, one source and three targets
    data/records.py       one record type, a reader for every annotation format;  data/check.py  is a set whole?
    data/augment.py       image and box move together
    data/words.py         EDA, left and right;  data/tokenizer.py  WordPiece and whole-word masking
    data/batches.py       records to a Batch
    layers.py             the one attention, the MLPs, one block for each norm order
    encoders.py           image, text and fusion encoders
    losses.py             contrastive, matching and masked-word losses as pure functions
    similarity.py         the contrastive loss of large batches in tiles, pooled regions, top-k of large galleries
    retriever.py          MRA: the encoders, the heads and the loss terms of one batch
    ranking.py            two-stage search and its metrics
    checkpoint.py         what is saved, and resumed
    weights.py            BERT and vision transformers from elsewhere;  released.py  the released MRA checkpoints
    gallery.py            a folder of one's own photographs, encoded once
    training.py           optimiser, schedule and the loop
    figures.py            pictures for people
    diffusion/            DaD: images of the source's people in the target's look; has a reading order of its own
    contrasts.py          runs compared in pairs, with intervals;  study.py  the ablation: images, losses, labels

Shape letters; a docstring says where it needs another (masks end in `_keep`: True = use it):

    B batch      N patches    T caption tokens   P phrase tokens   M masked words   R regions
    D width      E embedding  S keys attended    V vocabulary      H x W pixels
    Q queries    G gallery images   in diffusion/: C channels   h x w pixels of the latents   K noise levels

Paper: "MRA" below is arXiv 2507.10195; its equations and sections are cited where a line implements them.
"""
