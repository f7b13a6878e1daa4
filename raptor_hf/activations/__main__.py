"""`python -m raptor_hf.activations verify FOLDER`: check an activation dataset."""

from .store import main

if __name__ == "__main__":
    main()
