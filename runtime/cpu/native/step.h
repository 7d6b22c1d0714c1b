// The tokens of one step of a decoder.
#pragma once

namespace enginehouse {

// One iteration: `chunks` runs of tokens, each of one sequence from position start[i] on.
struct Step {
  int chunks, tokens;
  const int* token_ids;     // [tokens]
  const int* count;         // [chunks]: tokens of each
  const int* start;         // [chunks]: the position of its first
  const int* rope;          // [chunks]: its global rotary table, 0, or 2 for longrope's short one
  const int* slot;          // [chunks]: the place of what it keeps in the layers of linear attention
  const int* table_offset;  // [chunks]: where its blocks begin in tables
  const int* tables;
};

}  // namespace enginehouse
