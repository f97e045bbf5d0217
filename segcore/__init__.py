"""segcore: labels images of any size with a network that sees only a part of them. See DESIGN.md beside this file."""
