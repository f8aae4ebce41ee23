"The list of jobs for a GPU, at toy size on the CPU: run once, skipped the second time."
import lzma

import pytest

from enigma_lab.dev.gpu_jobs import main, trainings
from enigma_lab.lab.runs import list_runs, runs_root

@pytest.mark.proof(
    'dev.gpu_jobs', 'lm.train', 'sgdd.train', 'ddpm.train', 'maskpro.train',
    'flow.train', 'bench.sequence', seeds=(0,)
)
def test_jobs_run_once(tmp_path, own_runs, capsys):
    (tmp_path/'source'/'zh_text').mkdir(parents=True)
    text = '\n\n'.join(
        '第%d回 滾滾長江東逝水，浪花淘盡英雄。是非成敗轉頭空，青山依舊在，幾度夕陽紅。'
        % i
        * (1 + i % 5)
        for i in range(150)
    )
    (tmp_path/'source'/'zh_text'/'classic_test.txt.xz').write_bytes(lzma.compress(text.encode()))
    words = [
        '--small',
        '--source',
        str(tmp_path / 'source'),
        '--only',
        'chinese',
        'base-fp32',
        'too-many-gpus',
        'sgdd-natural',
        'ddpm-cifar10',
        'maskpro-cifar10',
        'maskpro-export',
        'flow-cifar10',
        'copy-2000',
    ]
    main(words)
    first = capsys.readouterr().out
    assert first.count("'done': True") == 9, first
    main(words)
    assert capsys.readouterr().out.count('done before') == 9
    assert (
        len([run for run in list_runs('train_enigma') if run.finished]) == 2 and trainings() == []
    )
    assert (runs_root() / 'gpu' / 'chinese.result.json').is_file() and (
        runs_root() / 'gpu' / 'maskpro-export.json'
    ).is_file()
    names = 'train_sgdd', 'train_ddpm', 'train_maskpro', 'train_flow', 'bench_sequence'
    assert [len(list_runs(name)) for name in names] == [1, 1, 1, 1, 1]
