"""Parts of a check that end in every way; none of them imports torch."""

import os
import time


def good(job, figures):
    figures.update(value=1.5, folder=job.data.name, process=os.getpid())


def as_good(job, figures):
    print("what a library says")
    figures["process"] = os.getpid()


def broken(job, figures):
    figures.update(seen=3, odd=object())
    raise ValueError("not what it should be")


def endless(job, figures):
    time.sleep(60)


def killed(job, figures):
    os._exit(7)


def not_a_number(job, figures):
    figures["value"] = float("nan")
