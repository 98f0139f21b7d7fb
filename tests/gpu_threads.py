"""Hopper's small kernels on a CPU: all threads of a block in step, and races found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NOBODY, EVERYBODY = -1, 2**31 - 1


class Shared:
    """Numbers that all threads see: poisoned at first, and not touched by two threads unsynchronised if one writes."""

    def __init__(self, size, values=None):
        self.values = np.full(size, -(2**31) + 12345, np.int32) if values is None else np.array(values)
        self.dtype = self.values.dtype
        self.synchronise()

    def __getitem__(self, index):
        """What all threads look at together, which none may have written."""
        if not 0 <= index < len(self.values):
            raise IndexError(f"{index} of {len(self.values)}")
        return jax.device_put(self.values[index])

    def synchronise(self):
        size = len(self.values)
        self.writer = np.full(size, NOBODY)
        self.first_reader, self.last_reader = np.full(size, EVERYBODY), np.full(size, NOBODY)


class Threads:
    """What threads.py has, for all threads of a block at once: a number each has of its own is an array."""

    def __init__(self, number, arrays):
        self.numbers, self.arrays = np.arange(number), arrays

    def number(self):
        return jnp.asarray(self.numbers, jnp.int32)

    def load(self, array, index):
        thread, index = self.numbers, self._within(array, index)
        self._claim(((array.writer[index] == NOBODY) | (array.writer[index] == thread)).all())
        np.minimum.at(array.first_reader, index, thread)
        np.maximum.at(array.last_reader, index, thread)
        return jax.device_put(array.values[index])

    def store(self, array, index, value, where=True):
        where = np.broadcast_to(where, self.numbers.shape)
        thread, index = self.numbers[where], self._within(array, index, where)
        self._claim(len(np.unique(index)) == len(index))
        self._claim(((array.writer[index] == NOBODY) | (array.writer[index] == thread)).all())
        self._claim(((array.first_reader[index] >= thread) & (array.last_reader[index] <= thread)).all())
        array.writer[index] = thread
        array.values[index] = np.broadcast_to(value, self.numbers.shape)[where]

    def load_words(self, matrix, row, column, number):
        """Of a matrix that none writes: a numpy array, as those that `store_words` writes."""
        return [jax.device_put(word) for word in self._words(matrix)[self._places(matrix, row, column, number)]]

    def store_words(self, words, matrix, row, column, where):
        where = np.broadcast_to(where, self.numbers.shape)
        row, column = (np.broadcast_to(x, where.shape)[where] for x in (row, column))
        places = self._places(matrix, row, column, len(words))
        self._claim(len(np.unique(places)) == places.size)
        self._words(matrix)[places] = np.stack([np.broadcast_to(word, where.shape)[where] for word in words])

    def store_numbers(self, numbers, matrix, row, column, where):
        where = np.broadcast_to(where, self.numbers.shape)
        row, column = (np.broadcast_to(x, where.shape)[where] for x in (row, column))
        self._claim(len(np.unique(row * matrix.shape[1] + column)) == len(row))
        if (column % len(numbers)).any() or not ((0 <= row) & (row < len(matrix))).all():
            raise IndexError(f"{row}, {column} of {matrix.shape}")
        for i, number in enumerate(numbers):
            matrix[row, column + i] = np.broadcast_to(number, where.shape)[where]

    def _words(self, matrix):
        return matrix.reshape(-1).view(np.float32 if matrix.dtype == np.float32 else np.int32)

    def _places(self, matrix, row, column, number):
        row, column, size = np.int64(row), np.int64(column), number * 4 // matrix.itemsize
        inside = (0 <= row) & (row < matrix.shape[0]) & (0 <= column) & (column + size <= matrix.shape[1])
        if not (inside & (column % size == 0)).all():
            raise IndexError(f"{row}, {column} of {matrix.shape}")
        return (row * matrix.shape[1] + column) // size * number + np.arange(number)[:, None]

    def of_lane(self, value, lane):
        """What threads of the same warp have."""
        lane = np.asarray(lane)
        if not ((0 <= lane) & (lane < 32)).all():
            raise IndexError(f"lane {lane}")
        return jnp.asarray(value)[self.numbers // 32 * 32 + lane]

    def synchronise(self):
        for array in self.arrays:
            array.synchronise()

    def _within(self, array, index, where=slice(None)):
        index = np.broadcast_to(index, self.numbers.shape)[where]
        if not ((0 <= index) & (index < len(array.values))).all():
            raise IndexError(f"{index} of {len(array.values)}")
        return index

    def _claim(self, alone):
        if not alone:
            raise AssertionError("a thread writes what another reads or writes meanwhile")


def counted(lower, upper, body, carry):
    """lax.fori_loop over what is there, and not traced."""
    return functools.reduce(lambda carry, i: body(i, carry), range(lower, upper), carry)
