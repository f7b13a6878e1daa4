"""`python -m raptor_hf.activations verify FOLDER`: check an activation dataset."""

from .verify import main

if __name__ == "__main__":
    main()
