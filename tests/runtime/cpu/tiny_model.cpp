// Steps of a tiny model of odd sizes: every form, zero points, windows, caps, norms, traits, latents, heads of several
// sizes. For sanitizers, and for CPUs that are not here. Prints "alike" when a prompt in one step, in three, beside another and
// as one of many gave the same bits, and tokens were chosen alike together and one by one, however keys are kept; then
// the last logits with those in bf16.
#include <cstdio>

#include "engine.cpp"

static float next_float(unsigned& state) {
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 24) - 0.5f;
}

template <class T, class F>
static Array<T> filled(size_t n, F&& f) {
  Array<T> values(n);
  for (auto& value : values) value = T(f());
  return values;
}

template <class T>
static void append(Array<T>& to, const T* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to.push_back(from[i]);
}

static bool same(const Array<float>& a, const Array<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// The sum of each part's weights, which a tile of many rows reads and one of few rows counts.
static Array<int16_t> counted(const Linear& l) {
  const int part = part_of(l.input), parts = l.in / part;
  Array<int16_t> counts(size_t(parts) * l.out);
  const int each = l.form == Form::int4 ? 8 : 4;  // inputs of a word
  for (int o = 0; o < l.out; ++o)
    for (int k = 0; k < l.in; ++k) {
      const uint8_t* word = l.block(o / kCols) + size_t(k / each) * kCols * 4 + o % kCols * 4;
      const int of_word = k % each, byte = word[of_word % 4];
      const int w = each == 4 ? byte - 128 : (of_word < 4 ? byte & 15 : byte >> 4) - 8;
      counts[(size_t(o / kCols) * parts + k / part) * kCols + o % kCols] += int16_t(w);
    }
  return counts;
}

// Of every row of a step a token, chosen in another way each: together, or a row at a time.
static Array<float> sampled(Model* m, int n, int vocab, bool together) {
  int next = 0;
  const auto rows = filled<int>(n, [&] { return next++; });
  eh_logits(m, rows.data(), n);
  const u32 allowed[] = {0xfffffff1u, 0x7fffffffu, 0x3fu};
  const int ids[] = {0, 3, vocab - 1};
  const float values[] = {0.5f, 2.f, -1.f};
  Array<int> top(n * 5);
  Array<float> logprobs(n * 5), told;
  Array<Choice> choices(n);
  for (int i = 0; i < n; ++i) {
    Choice& c = choices[i] = {};
    if (i % 3 == 0) c.allowed = allowed;
    if (i % 2) c.biased = c.counted = ids, c.biases = c.counts = values, c.num_biased = c.num_counted = 3;
    if (i % 5 == 0) c.forbidden = ids, c.num_forbidden = 3;
    c.repetition = 1.5f, c.frequency = 0.3f, c.presence = 0.2f, c.temperature = 0.7f + float(i % 4);
    c.number = double(i) / n, c.top_p = i % 4 ? 0.9 : 1, c.min_p = i % 7 ? 0 : 0.1, c.top_k = i % 6 ? 0 : 4;
    c.row = i, c.draws = i % 8 != 0, c.tells = 1, c.told = {&top[i * 5], &logprobs[i * 5], 0, i % 6, 0, 0};
  }
  if (together) eh_sample(m, choices.data(), n);
  for (int i = 0; i < n && !together; ++i) eh_sample(m, &choices[i], 1);
  for (const Choice& c : choices)
    for (float x : {float(c.token), c.told.logprob, float(c.told.rank)}) told.push_back(x);
  append(told, logprobs.data(), logprobs.size());
  auto scores = filled<Told>(n, [&] { return Told{top.data(), logprobs.data(), 5, 3, 0, 0}; });
  eh_score(m, scores.data(), 1);
  told.push_back(scores[0].logprob);
  return told;
}

// Whose second layer is another: of latents; or the first has linear attention, and the second gates; or their heads
// differ, a third reads the first's keys, layers have inputs of their own, and experts norms of theirs, or there are
// several streams, a learned residual and gates that end.
enum Kind { kPlain, kLatent, kStates, kSeveral };

// kept: of enum Kept. experts: 0 for a dense model. whole: becomes the last logits.
static bool alike(int kept, int experts, Kind kind, Array<float>& whole) {
  constexpr int kHidden = 48, kHeads = 3, kKv = 1, kInner = 64, kVocab = 70, kBlocks = 12, kMany = 4;
  constexpr int kTokens = 37, kRotary = 8, kQueryRank = 22, kNope = 20, kValue = 12, kInputs = 12, kLowRank = 5, kOfStreams = 3;
  const bool states = kind == kStates, several = kind == kSeveral, streams = several && !experts;
  const int latent_rank = kind == kLatent ? 18 : 0, layers = several ? 3 : 2;
  const int head_size = latent_rank ? latent_rank + kRotary : kept == 2 ? 12 : 16;
  // Norms over all heads, a layer that turns nothing, scales, queries that grow, bounds. With experts: scores by
  // sigmoid, corrected, groups, a shared expert with a gate, clamped gates.
  const bool other_traits = kept == 2, mixed = experts > 0;
  Shape shape = {};
  shape.hidden = kHidden, shape.normed = kHidden - 3, shape.layers = layers, shape.heads = kHeads;
  if (latent_rank) shape.latent_rank = latent_rank, shape.query_rank = kQueryRank, shape.nope = kNope, shape.value = kValue;
  shape.rotary = kRotary, shape.expert_inner = mixed ? kInner : 0, shape.vocab = kVocab;
  shape.num_blocks = kBlocks, shape.block_size = 16, shape.max_tokens = kMany * kTokens, shape.threads = 2;
  shape.kept = kept, shape.activation = kGelu, shape.gated = 1, shape.norm_sublayers = 1;
  shape.norm_all_heads = shape.rope_interleaved = other_traits, shape.norm_turned_heads = mixed;
  shape.experts = experts, shape.chosen = experts / 3, shape.renormalize = shape.sigmoid = mixed;
  shape.groups = mixed ? 3 : 1, shape.chosen_groups = mixed ? 2 : 1, shape.group_best = mixed ? 2 : 1;
  shape.epsilon = 1e-5f, shape.embedding_scale = 2.f, shape.residual_scale = other_traits ? 0.5f : 1.f;
  shape.logits_scale = other_traits ? 0.1f : 1.f, shape.logits_cap = 30.f, shape.share_scale = mixed ? 2.5f : 1.f;
  shape.scales_inputs = mixed, shape.l2_norm_heads = other_traits;
  shape.growth_length = other_traits ? 4 : 0, shape.growth_beta = 0.1f, shape.clip = other_traits ? 0.5f : 0.f;
  shape.swiglu_limit = mixed ? 0.5f : 0.f, shape.swiglu_alpha = 1.7f;
  shape.kept_layers = states ? 1 : 2, shape.num_slots = kMany, shape.gated_attention = states;
  if (states) {
    shape.delta_layers = 1, shape.delta_heads = 2, shape.delta_group = 2, shape.delta_key = 16;
    shape.delta_value = 32, shape.delta_kernel = 3;
  }
  if (several) shape.inputs = kInputs, shape.inputs_vocab = kVocab - 9, shape.norm_values = 1, shape.norm_experts = mixed;
  shape.streams = streams ? kOfStreams : 1, shape.low_rank = streams ? kLowRank : 0;
  const DeltaSizes z = shape.delta();
  LayerShape shapes[3];
  for (int l = 0; l < layers; ++l) shapes[l] = {kInner - 3, states || l == 2 ? 0 : l, head_size, states && !l ? 0 : kKv, streams && l ? 0.5f : -INFINITY};
  if (several) shapes[1].head_size = 26, shapes[1].kv_heads = kHeads;
  Model* m = eh_open(&shape, shapes);
  unsigned state = 7;
  auto number = [&] { return next_float(state); };
  auto bf16 = [&] { return to_bf16(next_float(state)); };
  auto byte = [&] { return int((next_float(state) + 0.5f) * 255); };
  const auto embedding = filled<u16>(kVocab * kHidden, bf16);
  const auto cos = filled<float>(64 * 4, number), sin = filled<float>(64 * 4, number);
  const auto floats = filled<float>(4096, number);
  Array<Array<uint8_t>> weights;
  Array<Array<int16_t>> counts;
  Linear linear;
  auto made = [&](Form form, int out, int in, Input input) {
    linear = {};
    linear.form = form, linear.in = round_up(in, kStep), linear.out = round_up(out, kCols);
    linear.group = form == Form::bf16 ? 0 : kStep;
    linear.input = input;
    const size_t values = size_t(linear.in) * linear.out;
    if (form == Form::bf16) {
      const auto words = filled<u16>(values, bf16);
      const auto* bytes = reinterpret_cast<const uint8_t*>(words.data());
      weights.push_back({});
      append(weights.back(), bytes, values * 2);
    } else {
      weights.push_back(filled<uint8_t>(form == Form::int4 ? values / 2 : values, byte));
      linear.scales = floats.data(), linear.zeros = form == Form::int4 ? floats.data() + 7 : nullptr;
    }
    linear.weights = weights.back().data();
    linear.bias = floats.data() + 100, linear.factor = floats.data() + 200;
    if (part_of(input)) {
      counts.push_back(counted(linear));
      linear.counts = counts.back().data();
    }
    return &linear;
  };
  eh_embedding(m, embedding.data());
  const auto set = [&](int l, Which which, const Linear* linear, int whose = 0) { eh_linear(m, l, int(which), whose, linear); };
  for (int i = 0; i < 3; ++i) eh_rotary(m, i, i && several ? 3 : kRotary / 2, cos.data(), sin.data());
  const auto known = filled<u16>(kVocab * 3 * 16, bf16);
  if (several) {
    eh_inputs(m, known.data(), floats.data() + 70);
    set(0, Which::inputs, made(Form::bf16, layers * shape.wide_inputs(), kHidden, Input::bf16));
  }
  for (int i = 1; i < shape.streams; ++i)
    for (const Which which : {Which::stream_openings, Which::stream_merges}) set(0, which, made(Form::bf16, kHidden, kHidden, Input::bf16), i - 1);
  for (int l = 0; l < layers; ++l) {
    eh_rule(m, l, 0.25f, 20.f, kept ? 0.01f : 1.f, l ? 9 : 0, 0, l && other_traits ? -1 : l % 2);
    for (int which = 0; which < kNorms; ++which)
      if (!other_traits || l || (which != kInput && which != kPreFeedForward)) eh_norm(m, l, which, floats.data(), nullptr);
    const Input one = l ? Input::bytes : Input::bf16, other = l ? Input::bf16 : Input::bytes;
    const float* of_mixed = mixed ? floats.data() + 9 : nullptr;
    eh_layer(m, l, of_mixed, several ? nullptr : of_mixed, several ? floats.data() + 40 + l : nullptr);
    if (mixed) eh_router(m, l, floats.data(), l ? floats.data() + 5 : nullptr, floats.data() + 50, several ? of_mixed : nullptr);
    if (states && !l) {
      eh_delta(m, l, floats.data() + 300, floats.data() + 20, floats.data() + 60, floats.data() + 1000);
      set(l, Which::in_qkvz, made(Form::int4, z.width(), kHidden, Input::bytes));
      set(l, Which::in_ba, made(Form::bf16, z.rates(), kHidden, Input::bf16));
      set(l, Which::linear_dense, made(Form::int8, kHidden, z.read(), Input::fine_bytes));
    } else if (latent_rank) {
      set(l, Which::kv_a, made(l ? Form::e4m3 : Form::bf16, head_size, kHidden, l ? Input::e4m3_by_row : one));
      set(l, Which::q_a, made(Form::int8, kQueryRank, kHidden, other));
      set(l, Which::q, made(Form::int4, kHeads * (kNope + kRotary), kQueryRank, one));
      for (int h = 0; h < kHeads; ++h) {
        set(l, Which::of_keys, made(Form::bf16, latent_rank, kNope, Input::bf16), h);
        set(l, Which::of_values, made(Form::bf16, kValue, latent_rank, Input::bf16), h);
      }
    } else if (l == 2) {
      set(l, Which::q, made(Form::int8, kHeads * head_size, kHidden, other));
    } else {
      set(l, Which::qkv, made(l ? Form::e4m3 : Form::bf16, m->width(shapes[l]), kHidden, l ? Input::e4m3_by_row : one));
    }
    if (!states || l) set(l, Which::dense, made(Form::int8, kHidden, m->given(shapes[l]), other));
    for (int e = 0; e < experts; ++e) {
      set(l, Which::expert_fc_gate, made(Form::e4m3, 2 * kInner, kHidden, Input::e4m3), e);
      set(l, Which::expert_proj, made(Form::bf16, kHidden, kInner, Input::bf16), e);
    }
    const bool apart = l && !mixed && (kind == kPlain || several);  // fc and gate
    set(l, Which::fc_gate, made(Form::int4, apart ? kInner : 2 * kInner, kHidden, one));
    if (apart) set(l, Which::gate, made(Form::e4m3, kInner, kHidden, Input::e4m3));
    if (several) {
      set(l, Which::input_gate, made(Form::bf16, shape.wide_inputs(), kHidden, Input::bf16));
      set(l, Which::input_proj, made(Form::int8, kHidden, shape.wide_inputs(), Input::fine_bytes));
    }
    if (streams) {
      eh_streams(m, l, floats.data() + 300, floats.data() + 500, floats.data() + 600, floats.data() + 700);
      set(l, Which::low_left, made(Form::bf16, kLowRank, kHidden, Input::bf16));
      set(l, Which::low_right, made(Form::bf16, kHidden, kLowRank, Input::bf16));
    }
    set(l, Which::proj, made(Form::int4, kHidden, kInner, l ? other : Input::fine_bytes));
  }
  eh_norm(m, 0, kNorms, floats.data(), nullptr);
  set(0, Which::lm_head, made(Form::int8, kVocab, kHidden, Input::fine_bytes));

  const auto ids = filled<int>(kTokens, [&] { return int((next_float(state) + 0.5f) * kVocab); });
  auto run = [&](std::initializer_list<int> cuts, std::initializer_list<int> table) {
    Array<float> logits;
    int start = 0, rope = 0, offset = 0, slot = 1;
    for (int end : cuts) {
      const int count = end - start, row = count - 1;
      const Step step = {1, count, ids.data() + start, &count, &start, &rope, &slot, &offset, table.begin()};
      eh_step(m, &step);
      logits.clear();
      append(logits, eh_logits(m, &row, 1), kVocab);
      start = end;
    }
    return logits;
  };
  auto beside_another = [&] {
    Array<int> all;
    append(all, ids.end() - 3, 3), append(all, ids.begin(), kTokens);
    const int count[] = {3, kTokens}, start[] = {0, 0}, rope[] = {2, 0}, slot[] = {1, 0}, offset[] = {3, 0}, table[] = {4, 7, 0, 6};
    const Step step = {2, 3 + kTokens, all.data(), count, start, rope, slot, offset, table};
    const int row = 2 + kTokens;
    eh_step(m, &step);
    Array<float> logits;
    append(logits, eh_logits(m, &row, 1), kVocab);
    return logits;
  };
  // So many rows that they go by panels.
  auto as_one_of_many = [&] {
    Array<int> all, count, start, rope, slot, offset, table;
    for (int i = 0; i < kMany; ++i) {
      append(all, ids.begin(), kTokens);
      count.push_back(kTokens), start.push_back(0), rope.push_back(0), slot.push_back(i), offset.push_back(3 * i);
      for (int block = 0; block < 3; ++block) table.push_back(3 * i + block);
    }
    const Step step = {kMany, kMany * kTokens, all.data(), count.data(), start.data(), rope.data(), slot.data(), offset.data(), table.data()};
    const int row = 3 * kTokens - 1;
    eh_step(m, &step);
    Array<float> logits;
    append(logits, eh_logits(m, &row, 1), kVocab);
    return logits;
  };
  whole = run({kTokens}, {0, 3, 5});
  const bool stepped_alike = same(whole, run({5, 6, kTokens}, {8, 1, 2})) && same(whole, beside_another()) && same(whole, as_one_of_many());
  const int count = kTokens, start = 0, zero = 0, table[] = {0, 3, 5};
  const Step step = {1, count, ids.data(), &count, &start, &zero, &zero, &zero, table};
  eh_step(m, &step);
  const bool chosen_alike = same(sampled(m, kTokens, kVocab, true), sampled(m, kTokens, kVocab, false));
  eh_close(m);
  return stepped_alike && chosen_alike;
}

int main() {
  Array<float> logits, other;
  const bool heads_alike = alike(0, 0, kPlain, logits) && alike(1, 6, kPlain, other) && alike(2, 0, kPlain, other);
  const bool others_alike = alike(0, 0, kLatent, other) && alike(0, 0, kStates, other);
  const bool all_alike = heads_alike && others_alike && alike(0, 0, kSeveral, other) && alike(1, 6, kSeveral, other);
  std::puts(all_alike ? "alike" : "different");
  for (float x : logits) std::printf("%.9g\n", x);
}
