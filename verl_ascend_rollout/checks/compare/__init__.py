"""`ascend-safe compare`: smoke reports side by side, and which of their numbers may be compared at all.

Needs no platform, no torch and no vLLM: it reads JSON.

    cli         the options
    reading     the reports, and what is wrong with a file
    pairs       each report beside the first
    times       which times, rates and sizes may be compared, and why not
    outputs     tokens and log-probabilities
    explain     why numbers differ, from what was recorded
    next_steps  what was not run
    verdicts    the checks
    sections    the tables and texts
    build       all of it as one report
    plot        the picture
    wording     numbers with units, and other people's text made harmless
"""
