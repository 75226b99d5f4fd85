"""Everything, from nothing: `make bench`, or `python -m benchmarks`. One script alone: `python -m benchmarks.drain`."""

from benchmarks import drain, figures

if __name__ == "__main__":
    figures.main(drain.measure, description=__doc__)
