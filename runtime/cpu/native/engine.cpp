// What Python calls. Sizes are asserted here; the caller has refused what a user could get wrong.
#include "model.h"

using namespace enginehouse;

#pragma GCC visibility push(default)
extern "C" {

void eh_close(Model* m) {
  m->~Model();
  std::free(m);
}

// shapes: [layers]. Null where there is no memory for keys and values.
Model* eh_open(const Shape* shape, const LayerShape* shapes) {
  void* place = std::aligned_alloc(alignof(Model), sizeof(Model));
  if (!place) return nullptr;
  Model* m = new (place) Model(*shape, shapes);
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

// cos, sin: [positions, half], which stay the caller's. index: 0 global, 1 local, 2 short.
void eh_rotary(Model* m, int index, int half, const float* cos, const float* sin) {
  assert(2 * half <= kMostHead);
  m->heads.cos[index] = cos, m->heads.sin[index] = sin, m->heads.half[index] = half;
}

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

// router: [experts, hidden], the caller's, as bias, correction and scale, [experts] or null.
void eh_router(Model* m, int layer, const float* router, const float* bias, const float* correction, const float* scale) {
  Experts& e = m->layers.at(layer).experts;
  e.router = router, e.bias = bias, e.correction = correction, e.scale = scale;
}

// sinks: [heads], shared_gate: [hidden], multiplier: [1], or null.
void eh_layer(Model* m, int layer, const float* sinks, const float* shared_gate, const float* multiplier) {
  Layer& l = m->layers.at(layer);
  l.sinks = sinks, l.shared_gate = shared_gate, l.multiplier = multiplier;
}

// Of what each layer gets besides: native/layer_inputs.h.
void eh_inputs(Model* m, const u16* table, const float* norm) { m->inputs().table = table, m->inputs().norm = norm; }

// Of linear attention: native/delta.h's DeltaWeights.
void eh_delta(Model* m, int layer, const float* filter, const float* speed, const float* bias, const float* norm) {
  DeltaWeights& w = m->layers.at(layer).linear;
  w.filter = filter, w.speed = speed, w.bias = bias, w.norm = norm;
}

// Of residual streams: native/shape.h's StreamWeights.
void eh_streams(Model* m, int layer, const float* router, const float* predictions, const float* corrections, const float* scale) {
  m->layers.at(layer).streams = {router, predictions, corrections, scale};
}

// which: of Which. whose: an expert, a head, or a stream but the first.
void eh_linear(Model* m, int layer, int which, int whose, const Linear* linear) {
  const Shape& s = m->s;
  const DeltaSizes z = s.delta();
  Layer& l = m->layers.at(layer);
  const int inner = l.inner(), both = round_up(2 * inner, kCols), one = round_up(inner, kCols);
  Linear* to = nullptr;
  const auto in_place = [&](Linear& place, int out, int in) {
    assert(linear->out == round_up(out, kCols) && linear->in == round_up(in, kStep));
    to = &place;
  };
  switch (Which(which)) {
    case Which::qkv: in_place(l.qkv, m->width(l), s.hidden); break;
    case Which::dense: in_place(l.dense, s.hidden, m->given(l)); break;
    case Which::fc_gate: in_place(l.fc_gate, !s.gated || linear->out == one ? inner : both, s.hidden); break;
    case Which::gate: in_place(l.gate, inner, s.hidden); break;
    case Which::proj: in_place(l.proj, s.hidden, inner); break;
    case Which::kv_a: in_place(l.kv_a, s.latent_size(), s.hidden); break;
    case Which::q_a: in_place(l.q_a, s.query_rank, s.hidden); break;
    case Which::q: in_place(l.q, m->queries(l), s.query_rank ? s.query_rank : s.hidden); break;
    case Which::in_qkvz: in_place(l.linear.in_qkvz, z.width(), s.hidden); break;
    case Which::in_ba: in_place(l.linear.in_ba, z.rates(), s.hidden); break;
    case Which::linear_dense: in_place(l.linear.dense, s.hidden, z.read()); break;
    case Which::input_gate: in_place(l.input_gate, s.wide_inputs(), s.hidden); break;
    case Which::input_proj: in_place(l.input_proj, s.hidden, s.wide_inputs()); break;
    case Which::low_left: in_place(l.low_left, s.low_rank, s.hidden); break;
    case Which::low_right: in_place(l.low_right, s.hidden, s.low_rank); break;
    case Which::lm_head: in_place(m->head, s.vocab, s.hidden); break;
    case Which::inputs: in_place(m->inputs().projection, s.layers * s.wide_inputs(), s.hidden); break;
    case Which::expert_fc_gate: in_place(l.experts.fc_gate.at(whose), 2 * s.expert_inner, s.hidden); break;
    case Which::expert_proj: in_place(l.experts.proj.at(whose), s.hidden, s.expert_inner); break;
    case Which::of_keys: in_place(l.of_keys.at(whose), s.latent_rank, s.nope); break;
    case Which::of_values: in_place(l.of_values.at(whose), s.value, s.latent_rank); break;
    case Which::stream_openings: in_place(m->streams().openings.at(whose), s.hidden, s.hidden); break;
    case Which::stream_merges: in_place(m->streams().merges.at(whose), s.hidden, s.hidden); break;
  }
  assert(to);
  assert(linear->form == Form::bf16 || (linear->group % kStep == 0 && linear->in % linear->group == 0 && linear->scales));
  assert(!part_of(linear->input) || (linear->counts && linear->form != Form::bf16));
  assert((Which(which) != Which::of_keys && Which(which) != Which::of_values) || (linear->form == Form::bf16 && linear->input == Input::bf16));
  *to = *linear;
}

}  // extern "C"
#pragma GCC visibility pop
