from titans_kernels.models import TitansConfig, TitansModel, TitansForCausalLM  # pip install 'titans_kernels[hf]'
