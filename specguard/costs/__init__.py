"""What drafting costs on this machine: measured through the seam, and kept."""
