"""Data sets: their rows, the places of their pictures, and pictures made upright RGB. Knows no database or model."""
