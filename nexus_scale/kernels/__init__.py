"""Operations with one signature each, over a fused and a plain implementation; `choice` picks one."""
