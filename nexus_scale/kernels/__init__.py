"""Operations with one signature each, and a fused and a plain path behind it; `choice` says which one serves."""
