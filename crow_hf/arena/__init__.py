"""Subjects x attacks x methods x seeds: which defence removes which backdoor, and what does it cost?"""
