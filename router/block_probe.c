// Where blocks are in the table of block_table.py, in one pass that fetches ahead what it will read: the table is larger than the caches,
// and two of its rows are read for each block. Called through ctypes; `BlockTable` does the same in numpy where this was not compiled.
#include <stddef.h>
#include <stdint.h>

enum { WAYS = 8, AHEAD = 16 };

uint32_t tandem_block_probe_abi(void) { return 1; }

static inline uint64_t row_of(uint64_t half, uint64_t num_rows) { return half * num_rows >> 32; }

// keys and numbers of the table (num_rows, WAYS). Of each block its cell, or any cell of its rows where it is not there, and its number, or 0.
void tandem_block_probe(const uint64_t *table, const uint32_t *table_numbers, uint64_t num_rows, const uint64_t *keys, size_t count,
                        int64_t *cells, uint32_t *numbers) {
  uint64_t rows[AHEAD][2];
  for (size_t i = 0; i < count + AHEAD; i++) {
    if (i >= AHEAD) {
      size_t block = i - AHEAD;
      uint64_t key = keys[block], *pair = rows[block % AHEAD];
      int64_t cell = pair[0] * WAYS;
      for (int row = 0; row < 2; row++)
        for (int way = 0; way < WAYS; way++)
          if (table[pair[row] * WAYS + way] == key) {
            cell = pair[row] * WAYS + way;
            row = 2;
            break;
          }
      cells[block] = cell;
      __builtin_prefetch(&table_numbers[cell]);
    }
    if (i < count) {
      uint64_t *pair = rows[i % AHEAD];
      pair[0] = row_of(keys[i] >> 32, num_rows);
      pair[1] = row_of(keys[i] & 0xFFFFFFFFu, num_rows);
      __builtin_prefetch(&table[pair[0] * WAYS]);
      __builtin_prefetch(&table[pair[1] * WAYS]);
    }
  }
  for (size_t i = 0; i < count; i++) numbers[i] = table[cells[i]] == keys[i] ? table_numbers[cells[i]] : 0;
}
