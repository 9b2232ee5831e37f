"""Metrics of generated images; `fid.py` is the script. docs/metrics.md says what each metric tells.

Metrics, each a function from features (or probabilities, classes) to numbers:
    fid.py  kid.py  mifid.py  prdc.py  inception_score.py  label_accuracy.py  outliers.py  class_wise.py
    cas.py                 trains a classifier on the images themselves
    ppl.py                 moves the latents of a generator
    bootstrap.py           intervals

From images to features:
    images.py              sets of images; class_matching.py finds the same classes in two of them
    detectors.py           what turns images into features; network_detectors.py has the ones made by others,
                           inception.py the layers in the middle of one of them
    features.py            one pass over the images, on all processes
    feature_cache.py       features that are kept in a file
    reference.py           mean and covariance in a file, for `fid.py calc`

From features to the result:
    settings.py            what an evaluation can be told; protocols.py has what papers chose
    table.py               all metrics of one set of images
    evaluation.py          several sets against one reference
    curve.py               the snapshots of a run against one reference
    format.py              results as text and as JSON
    options.py             command-line options; networks.py opens what those of `sweep` and `ppl` name
"""
