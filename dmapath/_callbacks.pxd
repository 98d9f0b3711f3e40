# cython: language_level=3
# around each call of a user's Python code from native code
cdef void enter() noexcept
cdef void leave() noexcept
# an exception that must not leave such a call
cdef void show(object error) noexcept
