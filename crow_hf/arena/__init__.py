"""Subjects x attacks x methods x seeds: does a purification work, and what does it cost?"""
