"""Kernels in C++, compiled for this machine on first use: functions stand in FAMILY.cpp, their callers in FAMILY.py.

Without a C++ compiler, or with `CXX=` set to nothing, they are unavailable, and torch's operations run instead.
"""
