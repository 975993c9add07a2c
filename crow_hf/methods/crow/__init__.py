"""crow"""
