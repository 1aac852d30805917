"""Human studies: people choose between samples of two systems, side by side and blind.

`new` makes a study's folder, `server` shows it to people, `answers` keeps what they say, `report` says what follows from it. A study's
folder:

    study.yaml     questions, ties, checks, judgements: a person may read and edit it until the first answer
    samples.json   which file shows which system: what blinds
    media/         files with random names
    answers.sqlite raters, what each was shown, what each chose
    report.html, report.json
"""
