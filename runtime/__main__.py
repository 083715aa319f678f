"""``python -m wavecast.runtime`` is the command ``wavecast``."""

from wavecast.runtime.cli import main

if __name__ == "__main__":
    main()
