"""The rows of the table in bench/README.md that can be measured without a guest, for bench/speed.py."""
