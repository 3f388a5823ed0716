"""`python -m llmcompress` is the command `llmcompress`."""

from llmcompress.cli.main import main

if __name__ == "__main__":
    main()
