"""`python -m sync_pipeline` is the command line."""

from sync_pipeline.cli import main

if __name__ == "__main__":
    main()
