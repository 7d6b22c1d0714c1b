// What Python calls. Sizes are asserted here; the caller has refused what a user could get wrong.
#include "model.h"

using namespace enginehouse;

#pragma GCC visibility push(default)
extern "C" {

Model* eh_open(const Shape* shape) try {
  return new Model(*shape);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void eh_close(Model* m) { delete m; }

void eh_step(Model* m, const Step* step) { m->run(*step); }

// Of rows of the last step; out: [n, vocab].
void eh_logits(Model* m, const int* rows, int n, float* out) { m->logits(rows, n, out); }

// embedding: bf16 [vocab, hidden], which stays the caller's.
void eh_embedding(Model* m, const u16* embedding) { m->embedding = embedding; }

// cos, sin: [positions, rotary / 2], which stay the caller's. index: 0 global, 1 local, 2 short.
void eh_rotary(Model* m, int index, const float* cos, const float* sin) { m->cos[index] = cos, m->sin[index] = sin; }

void eh_rule(Model* m, int layer, float scale, float cap, int window, int local_rope) {
  m->layers.at(layer).rule = {scale, cap, window, local_rope != 0};
}

// which: of Norm, or kNorms for the last norm of all.
void eh_norm(Model* m, int layer, int which, const float* weight, int count) {
  const bool of_head = which == kQuery || which == kKey;
  assert(count == (of_head ? m->s.head_size : m->s.hidden));
  (which == kNorms ? m->final_norm : m->layers.at(layer).norms.at(which)).assign(weight, weight + count);
}

static Linear& linear_of(Model* m, int layer, int which, int out, int in) {
  const int heads = m->s.heads * m->s.head_size;
  const int outs[] = {m->width(), m->s.hidden, 2 * m->s.inner, m->s.hidden, m->s.vocab};
  const int ins[] = {m->s.hidden, heads, m->s.hidden, m->s.inner, m->s.hidden};
  assert(out == outs[which] && in == ins[which]);
  if (which == 4) return m->head;
  Layer& l = m->layers.at(layer);
  Linear* all[] = {&l.qkv, &l.dense, &l.fc_gate, &l.proj};
  return *all[which];
}

// which: 0 qkv, 1 dense, 2 gate and up in turns of 16 outputs, 3 proj, 4 the head.
void eh_int4(Model* m, int layer, int which, const int8_t* q, const float* scales, const float* zeros,
             const float* bias, const float* factor, int out, int in, int group) {
  linear_of(m, layer, which, out, in) = pack_int4(m->arena, q, scales, zeros, bias, factor, out, in, group);
}

void eh_bf16(Model* m, int layer, int which, const u16* weight, const float* bias, const float* factor, int out, int in) {
  linear_of(m, layer, which, out, in) = pack_bf16(m->arena, weight, bias, factor, out, in);
}

}  // extern "C"
#pragma GCC visibility pop
