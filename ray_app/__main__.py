"""`python -m ray_app`, the same as `ray-app`."""

from ray_app.cli import main

if __name__ == "__main__":
    main()
