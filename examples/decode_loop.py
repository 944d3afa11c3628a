"""A decode loop as an inference engine has it: pages, one plan for all layers and steps, a CUDA graph.

A toy model (random weights, no positions) gives four answers to each of three questions about one document.
Document and questions are stored once, each answer has pages of its own. Runs on a CPU as well.
"""

import torch
from torch import Tensor, nn

import hydragen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY, PAGE, STEPS, ANSWERS = 2, 8, 2, 64, 1000, 16, 24, 4
WIDTH, KV_WIDTH = HEADS * DIM, KV_HEADS * DIM
torch.set_default_device(DEVICE)
embed, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH + 2 * KV_WIDTH) for _ in range(LAYERS))

document, questions = list(range(300)), [[7] * 20, [8] * 33, [9] * 5]
prompts = hydragen.PrefixTree.from_token_ids([document + question for question in questions])
tree = prompts.fork(ANSWERS)
# A pool per layer. One page table, with room for STEPS tokens in every answer, serves all of them.
pages = [-(-tokens // PAGE) for tokens in [*prompts.kv_lens, *[STEPS] * tree.num_rows]]
table = torch.randperm(sum(pages)).int()
pools = [torch.zeros(2, sum(pages), PAGE, KV_HEADS, DIM) for _ in range(LAYERS)]


def plan_for(tree: hydragen.PrefixTree, lens: Tensor, q_len: int) -> hydragen.Plan:
    """Plan for the first nodes of the page table, all layers and all lengths."""
    indptr = [sum(pages[:node]) for node in range(tree.num_nodes + 1)]
    kv = hydragen.PagedKV(*pools[0], indptr, table[: indptr[-1]])
    return hydragen.plan(tree, kv, num_q_heads=HEADS, q_len=q_len, kv_lens=lens)


def forward(ids: Tensor, plan: hydragen.Plan) -> Tensor:
    """Logits [rows, q_len, VOCABULARY] of new tokens [rows, q_len]; their keys and values join the pools."""
    x = embed(ids)
    for layer, pool in zip(layers, pools, strict=True):
        q, k, v = (y.unflatten(-1, (-1, DIM)) for y in layer(x).split([WIDTH, KV_WIDTH, KV_WIDTH], -1))
        plan.append((pool[0], pool[1]), k, v)
        x = x + plan.run(q, (pool[0], pool[1]), causal=True).flatten(-2)
    return head(x)


@torch.inference_mode()
def main() -> None:
    """Prefill every node once, then decode all answers, step by step."""
    lens = torch.zeros(tree.num_nodes, dtype=torch.int32)
    for node in range(prompts.num_nodes):  # parents come first; an engine would batch the nodes of a level
        ids = torch.tensor(prompts.node_tokens(node))[None]
        path = hydragen.PrefixTree.from_parents(prompts.parents[: node + 1], row_to_node=[node])
        plan = plan_for(path, lens[: node + 1], q_len=ids.shape[1])
        lens[node] = ids.shape[1]
        plan.update(lens[: node + 1])
        forward(ids, plan)

    plan, answers = plan_for(tree, lens, q_len=1), lens[prompts.num_nodes :]
    ids = torch.arange(tree.num_rows)[:, None]  # another first token for every answer

    def step() -> None:
        answers.add_(1)
        plan.update(lens)
        ids.copy_(forward(ids, plan)[:, -1:].argmax(-1))

    sampled, advance = [ids.clone()], step
    for at in range(STEPS):
        advance()
        sampled.append(ids.clone())
        if at == 0 and DEVICE == "cuda":  # the first step has compiled the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            advance = graph.replay
    print(tree.describe(6))
    for row, answer in enumerate(torch.cat(sampled, 1).tolist()):
        print(f"question {row // ANSWERS}, answer {row % ANSWERS}: {' '.join(map(str, answer))}")


if __name__ == "__main__":
    main()
