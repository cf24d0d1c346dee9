"""What every other part uses, and what uses none of them."""
