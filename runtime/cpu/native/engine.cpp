// What Python calls. Sizes are asserted here; the caller has refused what a user could get wrong.
#include "model.h"

using namespace enginehouse;

#pragma GCC visibility push(default)
extern "C" {

void eh_close(Model* m) {
  m->~Model();
  std::free(m);
}

// Null where there is no memory for keys and values.
Model* eh_open(const Shape* shape) {
  void* place = std::aligned_alloc(alignof(Model), sizeof(Model));
  if (!place) return nullptr;
  Model* m = new (place) Model(*shape);
  if (m->whole()) return m;
  eh_close(m);
  return nullptr;
}

void eh_step(Model* m, const Step* step) {
  const SmallAsZero small;
  m->run(*step);
}

// Of rows of the last step, behind the last norm: out [n, normed].
void eh_hidden(Model* m, const int* rows, int n, float* out) {
  const SmallAsZero small;
  m->hidden_states(rows, n, out);
}

// Of rows of the last step: [n, eh_stride], of which vocab count; valid until the next.
float* eh_logits(Model* m, const int* rows, int n) {
  const SmallAsZero small;
  m->logits(rows, n);
  return m->sampler().row(0);
}

int eh_stride(Model* m) { return m->sampler().stride; }

// Of rows of the last logits, which are changed.
void eh_sample(Model* m, Choice* choices, int n) {
  const SmallAsZero small;
  m->sampler().sample(choices, n);
}

// Of the last logits' first n rows.
void eh_score(Model* m, Told* told, int n) {
  const SmallAsZero small;
  m->sampler().score(told, n);
}

// out: [kPhases], seconds since the model was opened.
void eh_seconds(Model* m, double* out) { std::copy_n(m->clock.seconds, kPhases, out); }

// embedding: bf16 [vocab, hidden], which stays the caller's.
void eh_embedding(Model* m, const u16* embedding) { m->embedding = embedding; }

// cos, sin: [positions, rotary / 2], which stay the caller's. index: 0 global, 1 local, 2 short.
void eh_rotary(Model* m, int index, const float* cos, const float* sin) { m->heads.cos[index] = cos, m->heads.sin[index] = sin; }

// kept: what a layer's keys and values in bytes are multiplied by, else 1.
// rope: 0 for the table that a step names, 1 for the local one, -1 for none.
void eh_rule(Model* m, int layer, float scale, float cap, float kept, int window, int chunk, int rope) {
  assert(rope >= -1 && rope <= 1);
  m->layers.at(layer).rule = {scale, cap, kept, window, chunk, rope};
}

// which: of Norm, or kNorms for the last norm of all. weight: [hidden], [head_size], [heads of
// queries or keys, head_size], or the rank of latents, the caller's.
// bias: of a LayerNorm that has one, as long; else null.
void eh_norm(Model* m, int layer, int which, const float* weight, const float* bias) {
  assert(which <= kNorms && (!bias || m->s.layer_norm));
  (which == kNorms ? m->final_norm : m->layers.at(layer).norms[which]) = {weight, bias};
}

// router: [experts, hidden], the caller's, as bias and correction, [experts] or null.
void eh_router(Model* m, int layer, const float* router, const float* bias, const float* correction) {
  Experts& e = m->layers.at(layer).experts;
  e.router = router, e.bias = bias, e.correction = correction;
}

// inner: of the layer's plain MLP, or its shared expert. place: among the layers with keys and values, or with
// linear attention. sinks: [heads], shared_gate: [hidden], or null.
void eh_layer(Model* m, int layer, int inner, int place, const float* sinks, const float* shared_gate) {
  assert(inner >= 0 && inner <= m->s.inner && inner % kLanes == 0);
  assert(place >= 0 && place <= m->s.layers);
  Layer& l = m->layers.at(layer);
  l.inner = inner, l.place = place, l.sinks = sinks, l.shared_gate = shared_gate;
}

// Of linear attention: native/delta.h's DeltaWeights.
void eh_delta(Model* m, int layer, const float* filter, const float* speed, const float* bias, const float* norm) {
  DeltaWeights& w = m->layers.at(layer).linear;
  w.filter = filter, w.speed = speed, w.bias = bias, w.norm = norm;
}

// which: 0 qkv, 1 dense, 2 fc and gate in turns of 16 outputs, or fc alone where 3, gate, stands apart,
// 4 proj, 5 kv_a, 6 q_a, 7 q, 8 to 10 linear attention's in_qkvz, in_ba and dense, 11 the head; 12 and 13: fc and
// gate, and proj, of an expert; 14 and 15: of_keys and of_values, of a head. After eh_layer.
void eh_linear(Model* m, int layer, int which, int whose, const Linear* linear) {
  const Shape& s = m->s;
  const DeltaSizes z = s.delta();
  const int inner = m->layers.at(layer).inner, both = round_up(2 * inner, kCols), one = round_up(inner, kCols);
  const int fc_gate = !s.gated || linear->out == one ? inner : both, expert = s.expert_inner;
  const struct {
    int out, in;
  } sizes[] = {
      {m->width(), s.hidden},
      {s.hidden, s.heads * s.value_size()},
      {fc_gate, s.hidden},
      {inner, s.hidden},
      {s.hidden, inner},
      {s.head_size, s.hidden},
      {s.query_rank, s.hidden},
      {m->width(), s.query_rank ? s.query_rank : s.hidden},
      {z.width(), s.hidden},
      {z.rates(), s.hidden},
      {s.hidden, z.read()},
      {s.vocab, s.hidden},
      {2 * expert, s.hidden},
      {s.hidden, expert},
      {s.latent_rank, s.nope},
      {s.value, s.latent_rank},
  };
  assert(linear->out == round_up(sizes[which].out, kCols) && linear->in == round_up(sizes[which].in, kStep));
  assert(linear->form == Form::bf16 || (linear->group % kStep == 0 && linear->in % linear->group == 0 && linear->scales));
  assert(!part_of(linear->input) || (linear->counts && linear->form != Form::bf16));
  assert(which < 14 || (linear->form == Form::bf16 && linear->input == Input::bf16));
  Layer& l = m->layers.at(layer);
  Linear* plain[] = {&l.qkv, &l.dense, &l.fc_gate, &l.gate, &l.proj, &l.kv_a, &l.q_a, &l.q, &l.linear.in_qkvz, &l.linear.in_ba, &l.linear.dense, &m->head};
  Array<Linear>* several[] = {&l.experts.fc_gate, &l.experts.proj, &l.of_keys, &l.of_values};
  (which < 12 ? *plain[which] : several[which - 12]->at(whose)) = *linear;
}

}  // extern "C"
#pragma GCC visibility pop
