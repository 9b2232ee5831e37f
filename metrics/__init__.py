"""Metrics of generated images; `fid.py` is the script. docs/metrics.md says what each metric tells.

Metrics, each a function from features (or probabilities, classes) to numbers:
    fid.py  kid.py  prdc.py  inception_score.py  label_accuracy.py  outliers.py  class_wise.py
    cas.py                 trains a classifier on the images themselves
    bootstrap.py           intervals

From images to features:
    images.py              sets of images
    detectors.py           what turns images into features; network_detectors.py has the ones made by others
    features.py            one pass over the images, on all processes
    feature_cache.py       features that are kept in a file
    reference.py           mean and covariance in a file, for `fid.py calc`

From features to the result:
    settings.py            what an evaluation can be told
    table.py               all metrics of one set of images
    evaluation.py          several sets against one reference
    format.py              results as text and as JSON
    options.py             command-line options
"""
