#!/usr/bin/env bash
# Entry point of the image: any `smoothquant` command, or `engine`, which is all of them in a row.
set -euo pipefail

usage() {
    cat <<'END'
usage: engine --model DIR --out DIR (--text TEXT | --scales FILE) [--reference-text TEXT]
              [--export "OPTIONS"] [--build "OPTIONS"]
   or: any smoothquant command, as in  check DIR,  build tensorrt-llm CHECKPOINT --out ENGINE

Makes, below --out, and resumes where it stopped:
  act_scales.safetensors   calibrated on --text, unless --scales is given
  checkpoint/              smoothquant export trtllm, with the options of --export ("--tp 2 --alpha 0.85")
  engine/                  smoothquant build tensorrt-llm, with those of --build ("--max-batch-size 64")
  triton/                  a model repository for Triton
With --reference-text, the checkpoint is validated against the float model before the engine is built.
END
}

say() { printf '== %s\n' "$*" >&2; }

die() {
    printf 'entrypoint: %s\n' "$*" >&2
    usage >&2
    exit 2
}

engine() {
    local model='' out='' text='' scales='' reference_text='' name
    local -a export_options=() build_options=()
    while (($#)); do
        name=$1
        case $name in
            -h | --help) usage; exit 0 ;;
            --model | --out | --text | --scales | --reference-text | --export | --build) ;;
            *) die "unknown option $name" ;;
        esac
        (($# > 1)) || die "$name wants a value"
        case $name in
            --model) model=$2 ;;
            --out) out=$2 ;;
            --text) text=$2 ;;
            --scales) scales=$2 ;;
            --reference-text) reference_text=$2 ;;
            --export) read -ra export_options <<<"$2" ;;
            --build) read -ra build_options <<<"$2" ;;
        esac
        shift 2
    done
    [[ -n $model ]] || die "--model is missing"
    [[ -n $out ]] || die "--out is missing"
    [[ -n $text || -n $scales ]] || die "give --text to calibrate on, or --scales"
    [[ -d $model ]] || die "$model: no such folder; is it mounted (-v)?"
    mkdir -p "$out"

    if [[ -z $scales ]]; then
        scales=$out/act_scales.safetensors
        say "calibrate"
        [[ -f $scales ]] || smoothquant calibrate "$model" --text "$text" --out "$scales"
    fi
    say "export"
    smoothquant export trtllm "$model" "$scales" --out "$out/checkpoint" "${export_options[@]}"
    if [[ -n $reference_text ]]; then
        say "validate"
        smoothquant validate "$out/checkpoint" --reference "$model" --text "$reference_text" --report "$out/report.html"
    fi
    say "build"
    smoothquant build tensorrt-llm "$out/checkpoint" --out "$out/engine" "${build_options[@]}"
    say "serve"
    smoothquant serve-config "$out/engine" --out "$out/triton" --tokenizer "$model"
}

if [[ ${1:-} == engine ]]; then
    shift
    engine "$@"
else
    exec smoothquant "$@"
fi
