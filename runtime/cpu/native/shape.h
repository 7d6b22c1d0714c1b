// What a decoder is made of: its sizes and its layers.
#pragma once

#include <cmath>

#include "attention.h"
#include "delta.h"
#include "experts.h"
#include "norms.h"
#include "step.h"

namespace enginehouse {

enum Activation { kSilu, kGelu, kRelu2, kGeluErf };

inline V activated(const V& x, int activation) {
  if (activation == kRelu2) {
    const V above = larger(x, all(0));
    return above * above;
  }
  return activation == kGelu ? gelu(x) : activation == kGeluErf ? gelu_erf(x) : silu(x);
}

// As runtime/cpu/structures.py has it. hidden, expert_inner: whole vectors of 16, hidden with zeros behind its
// first `normed`; rotary: of latents, even. kept: of enum Kept. experts: 0 of a dense model. growth_length, clip,
// swiglu_limit: 0 for none. latent_rank: 0 without latent attention, whose keys are latents and behind them what
// rope turns; query_rank: 0 where queries are not compressed. kept_layers, delta_layers: those with keys and
// values, and those with linear attention, whose sizes are delta_*; delta_heads: 0 where there is none.
// inputs: numbers that each layer gets of a token besides, 0 for none; inputs_vocab: tokens that have some. streams:
// hidden states that go from layer to layer, mostly 1. low_rank: of a learned residual, 0 for none.
struct Shape {
  int hidden, normed, layers, heads, rotary, expert_inner, vocab;
  int latent_rank, query_rank, nope, value;
  int kept_layers, delta_layers, delta_heads, delta_group, delta_key, delta_value, delta_kernel;
  int inputs, inputs_vocab, streams, low_rank;
  int num_blocks, block_size, num_slots, max_tokens, threads;
  int kept, activation, gated, parallel, layer_norm, norm_sublayers, norm_all_heads, norm_turned_heads, l2_norm_heads, gated_attention, rope_interleaved;
  int norm_values, norm_experts;
  int experts, chosen, renormalize, sigmoid, groups, chosen_groups, group_best, scales_inputs, growth_length, growth_first, grows_unturned;
  float epsilon, embedding_scale, residual_scale, logits_scale, logits_cap;
  float share_scale, mixer_epsilon, growth_beta, clip, swiglu_limit, swiglu_alpha;

  int latent_size() const { return latent_rank + rotary; }  // of a latent, as it is kept
  int wide_inputs() const { return round_up(inputs, kLanes); }  // with zeros behind
  DeltaSizes delta() const { return {delta_heads, delta_group, delta_key, delta_value, delta_kernel}; }
  Routing routing() const { return {experts, chosen, renormalize, sigmoid, groups, chosen_groups, group_best, scales_inputs, share_scale, mixer_epsilon}; }
};

// A layer's own sizes, as runtime/cpu/structures.py has them. gates: of its plain MLP, or of its shared expert; 0 for
// none. place: among the layers with keys and values, of which another's may be read, or with linear attention.
// kv_heads: 0 where it reads no keys. cutoff: where gates end, in standard deviations above their mean; -INFINITY
// where all are whole.
struct LayerShape {
  int gates, place, head_size, kv_heads;
  float cutoff;

  int inner() const { return round_up(gates, kLanes); }
  int wide_head() const { return round_up(head_size, kLanes); }  // with zeros behind
  bool is_sparse() const { return cutoff > -INFINITY; }
};

enum Norm {
  kInput, kPost, kPreFeedForward, kPostFeedForward, kQuery, kKey, kQueryLatents, kLatents,
  kPreExperts, kPostShared, kPostExperts, kPostInputs, kStreams, kLowRank, kNorms
};

// Of what predicts and corrects residual streams: [streams, hidden], [streams, streams, streams], [streams, streams],
// [hidden]. The caller's.
struct StreamWeights {
  const float *router = nullptr, *predictions = nullptr, *corrections = nullptr, *scale = nullptr;
};

// gate: where it is no part of fc_gate, which is fc then, and there is one. In a mixture these are the shared
// expert's, whose gate, [hidden], is shared_gate, or null. sinks: [heads] or null. q: in the place of qkv where a
// layer reads another's keys; kv_a, q_a, q: where attention goes through latents; q reads what q_a gives, if there
// is one. linear: in the place of all of these where a layer has linear attention. of_keys, of_values: of each head
// what its queries and what attention gives are multiplied by, with latents. input_gate, input_proj: of what the
// layer gets besides. low_left, low_right: of a learned residual. multiplier: of all that it gives, or null.
struct Layer : LayerShape {
  Linear qkv, dense, fc_gate, gate, proj, kv_a, q_a, q, input_gate, input_proj, low_left, low_right;
  Array<Linear> of_keys, of_values;
  DeltaWeights linear;
  Experts experts;
  StreamWeights streams;
  NormWeights norms[kNorms];
  Rule rule;
  const float *sinks = nullptr, *shared_gate = nullptr, *multiplier = nullptr;

  bool is_linear() const { return linear.in_qkvz.weights; }
  // What reads the hidden state first.
  const Linear& entry() const { return is_linear() ? linear.in_qkvz : kv_a.weights ? kv_a : qkv.weights ? qkv : q; }
  bool attends() const { return entry().weights; }
  bool is_mixture() const { return experts.router; }
  bool has_mlp() const { return is_mixture() || fc_gate.weights; }
};

// As runtime/cpu/structures.py lists them: a layer's, the whole model's, and those of each expert or head of a layer,
// or of each stream but the first.
enum class Which {
  qkv, dense, fc_gate, gate, proj, kv_a, q_a, q, in_qkvz, in_ba, linear_dense, input_gate, input_proj,
  low_left, low_right,
  lm_head, inputs,
  expert_fc_gate, expert_proj, of_keys, of_values, stream_openings, stream_merges
};

// Rows of one chunk that lie in one unit of the cache: no other tile writes there.
struct Tile {
  int chunk, row, count, position;
};

}  // namespace enginehouse
