"""A local web page: two methods side by side from the same noise, their plans step by step, and plans to edit."""
