"""An agent that answers a question with two local tools, through the endpoint. See README.md beside this file.

The idea is that of TaskMatrix (Liang et al. 2023, arXiv:2303.16434): a model chooses tools and reads what they
return. Haystack's `Agent` runs the loop.
"""

import argparse
import ast
import operator
import pathlib

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from rag import ROOT, Store, client_of, read_passages

OPERATORS = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
  ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> str:
  """Returns the value of an expression, or a sentence that says what is wrong with it.

  The expression may have numbers, + - * / and brackets. A model wrote it, so it is parsed and never executed.
  """

  def value(node) -> float:
    if isinstance(node, ast.Expression):
      return value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
      return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
      return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
      return OPERATORS[type(node.op)](value(node.operand))
    raise ValueError('it may have only numbers, + - * / and brackets')

  try:
    return f'{value(ast.parse(expression, mode="eval")):g}'
  except (SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
    return f'cannot calculate {expression!r}: {error}'


def text_parameter(name: str) -> dict:
  """Returns the JSON schema of a tool with one text parameter."""
  return {
    'type': 'object',
    'properties': {name: {'type': 'string', 'maxLength': 80}},
    'required': [name],
    'additionalProperties': False,
  }


def make_agent(url: str, model: str, store: Store, log=print) -> Agent:
  """Returns an agent that can search documents and calculate.

  Args:
    url: the endpoint.
    model: the name of its model.
    store: finds passages of the documents.
    log: receives a line for each call of a tool.
  """

  def search(question: str) -> str:
    log(f'search({question!r})')
    return '\n\n'.join(f'({p.place}) {p.text[:300]}' for p in store.best(question, 2))

  def calculator(expression: str) -> str:
    result = calculate(expression)
    log(f'calculate({expression!r}) = {result}')
    return result

  tools = [
    Tool('search', 'Finds passages of the documents.', text_parameter('question'), search),
    Tool('calculate', 'Calculates with numbers.', text_parameter('expression'), calculator),
  ]
  generator = OpenAIChatGenerator(
    model=model, api_base_url=url, api_key=Secret.from_token('none'), timeout=600,
    generation_kwargs={'temperature': 0, 'max_tokens': 150},
  )  # fmt: skip
  return Agent(chat_generator=generator, tools=tools, max_agent_steps=6)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--url', default='http://127.0.0.1:8000/v1', help='the endpoint')
  parser.add_argument('--ask', required=True, metavar='QUESTION', help='what the agent answers')
  parser.add_argument(
    '--docs',
    type=pathlib.Path,
    default=ROOT / 'docs',
    metavar='FOLDER',
    help='Markdown files to search',
  )
  flags = parser.parse_args()
  _, model = client_of(flags.url)
  agent = make_agent(flags.url, model, Store(read_passages(flags.docs), None))
  print(agent.run(messages=[ChatMessage.from_user(flags.ask)])['messages'][-1].text)


if __name__ == '__main__':
  main()
