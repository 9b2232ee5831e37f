"""Reports for people to read: pages, tables and pictures that compare methods.

page.py writes the page, comparison.py fills it with the results of several methods, finding.py says in one sentence
what was found, plots.py draws the plots.
tradeoff.py writes the table and the plot of sweep.py, model_card.py the page that goes with an exported network.
review.py writes the page on which a person looks at the images of a set, facts.py gathers what it states.
"""
