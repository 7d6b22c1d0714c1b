// What a decoder is made of: its sizes and its layers.
#pragma once

#include "attention.h"
#include "delta.h"
#include "experts.h"
#include "norms.h"
#include "step.h"

namespace enginehouse {

enum Activation { kSilu, kGelu, kRelu2, kGeluErf };

// As runtime/cpu/library.py has it. hidden, inner, expert_inner: whole vectors of 16, hidden with zeros behind
// its first `normed`; inner: of the largest plain MLP; rotary even. kept: of enum Kept. experts: 0 of a dense
// model. growth_length, clip, swiglu_limit: 0 for none. latent_rank: 0 without latent attention, whose keys
// are of head_size, latents and behind them what rope turns; query_rank: 0 where queries are not compressed.
// kept_layers, delta_layers: those with keys and values, and those with linear attention, whose sizes are delta_*;
// delta_heads: 0 where there is none.
struct Shape {
  int hidden, normed, layers, heads, kv_heads, head_size, rotary, inner, expert_inner, vocab;
  int latent_rank, query_rank, nope, value;
  int kept_layers, delta_layers, delta_heads, delta_group, delta_key, delta_value, delta_kernel;
  int num_blocks, block_size, num_slots, max_tokens, threads;
  int kept, activation, gated, parallel, layer_norm, norm_sublayers, norm_all_heads, norm_turned_heads, l2_norm_heads, gated_attention, rope_interleaved;
  int experts, chosen, renormalize, sigmoid, groups, chosen_groups, group_best, scales_inputs, growth_length, growth_first, grows_unturned;
  float epsilon, embedding_scale, residual_scale, logits_scale, logits_cap;
  float share_scale, mixer_epsilon, growth_beta, clip, swiglu_limit, swiglu_alpha;

  int wide_head() const { return round_up(head_size, kLanes); }  // with zeros behind
  int wide_kept() const { return round_up(latent_rank ? latent_rank : head_size, kLanes); }  // of a value that is kept
  int value_size() const { return latent_rank ? value : head_size; }  // of what attention gives of a head
  int query_size() const { return gated_attention ? 2 * head_size : head_size; }  // with its gate behind it
  DeltaSizes delta() const { return {delta_heads, delta_group, delta_key, delta_value, delta_kernel}; }
  Routing routing() const { return {experts, chosen, renormalize, sigmoid, groups, chosen_groups, group_best, scales_inputs, share_scale, mixer_epsilon}; }
};

enum Norm { kInput, kPost, kPreFeedForward, kPostFeedForward, kQuery, kKey, kQueryLatents, kLatents, kNorms };

// gate: where it is no part of fc_gate, which is fc then, and there is one. inner: of the MLP that these make;
// in a mixture they are the shared expert's, whose gate, [hidden], is shared_gate, or null. sinks: [heads] or null.
// kv_a, q_a, q: in the place of qkv where attention goes through latents; q reads what q_a gives, if there is one.
// linear: in the place of all of these where a layer has linear attention. place: of the layer, among those with
// keys and values, or with linear attention.
// of_keys, of_values: of each head what its queries and what attention gives are multiplied by there.
struct Layer {
  Linear qkv, dense, fc_gate, gate, proj, kv_a, q_a, q;
  Array<Linear> of_keys, of_values;
  DeltaWeights linear;
  Experts experts;
  NormWeights norms[kNorms];
  Rule rule;
  int inner = 0, place = 0;
  const float *sinks = nullptr, *shared_gate = nullptr;

  bool is_linear() const { return linear.in_qkvz.weights; }
  const Linear& entry() const { return is_linear() ? linear.in_qkvz : kv_a.weights ? kv_a : qkv; }  // what reads the hidden state first
  bool attends() const { return entry().weights; }
  bool is_mixture() const { return experts.router; }
  bool has_mlp() const { return is_mixture() || fc_gate.weights; }
};

// Rows of one chunk that lie in one unit of the cache: no other tile writes there.
struct Tile {
  int chunk, row, count, position;
};

}  // namespace enginehouse
