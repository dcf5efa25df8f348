"""`python -m pkd_dist.cli`: the same as `pkd`."""

from pkd_dist.cli.main import main

if __name__ == "__main__":
    main()
