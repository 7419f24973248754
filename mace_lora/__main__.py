"""`python -m mace_lora` is the command `mace_lora`."""

from mace_lora.cli import main_tools

if __name__ == "__main__":
    main_tools()
