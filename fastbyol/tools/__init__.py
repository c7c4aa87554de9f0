"""Commands around a run: profile, bench, plan, report, preview, doctor and the example corpora.

Nothing else imports them.
"""
