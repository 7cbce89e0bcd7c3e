# The dashboard, as a program: `make dashboard` writes dashboards/sae-ray.json from it.

def ds: {type: "prometheus", uid: "${datasource}"};

def series($expr; $legend):
  {refId: "", datasource: ds, expr: $expr, legendFormat: $legend, editorMode: "code", range: true};

def panel($title; $description; $unit; $max; $targets):
  {type: "timeseries", title: $title, description: $description, datasource: ds,
   fieldConfig: {
     defaults: ({unit: $unit, min: 0,
                 custom: {lineWidth: 1, fillOpacity: 8, showPoints: "never", spanNulls: 60000}}
                + (if $max == null then {} else {max: $max} end)),
     overrides: []},
   options: {legend: {displayMode: "list", placement: "bottom"}, tooltip: {mode: "multi", sort: "desc"}},
   targets: ($targets | to_entries | map(.value + {refId: ([65 + .key] | implode)}))};

def row($title; $panels): [{type: "row", title: $title, collapsed: false, panels: []}] + $panels;

# Three panels of 8 columns to a line; a row's title takes a line of its own.
def placed:
  reduce .[] as $p ({y: 0, column: 0, id: 1, out: []};
    if $p.type == "row" then
      (if .column > 0 then .y += 8 | .column = 0 else . end)
      | .out += [$p + {id: .id, gridPos: {h: 1, w: 24, x: 0, y: .y}}] | .y += 1 | .id += 1
    else
      .out += [$p + {id: .id, gridPos: {h: 8, w: 8, x: (.column * 8), y: .y}}] | .id += 1
      | if .column == 2 then .column = 0 | .y += 8 else .column += 1 end
    end) | .out;

def of_run: "{run=~\"$run\"}";
def of_judge: "{run=~\"$run\", role=~\"$role\"}";
def gauge($name): "max by (run) (ray_sae_ray_\($name)\(of_run))";
def level($name): "max by (run, role) (ray_sae_ray_pool_\($name)\(of_judge))";
def total($name): "sum by (run, role) (ray_sae_ray_pool_\($name)\(of_judge))";
def rate($name): "sum by (run, role) (rate(ray_sae_ray_pool_\($name)_total\(of_judge)[$__rate_interval]))";
def s3($name): "sum by (run) (rate(ray_sae_ray_s3_\($name)_total\(of_run)[$__rate_interval]))";
def quantile($q):
  "histogram_quantile(\($q), sum by (run, role, le) "
  + "(rate(ray_sae_ray_pool_call_seconds_bucket\(of_judge)[$__rate_interval])))";
def run($suffix): "{{run}}" + $suffix;
def judge($suffix): "{{run}} {{role}}" + $suffix;
def variable($name; $title; $metric; $of):
  {name: $name, type: "query", label: $title, datasource: ds, multi: true, includeAll: true, refresh: 2, sort: 1,
   definition: "label_values(\($metric), \($of))",
   query: {query: "label_values(\($metric), \($of))", refId: $name}};

(row("Training"; [
  panel("FVU"; "Fraction of variance unexplained; 1 is as good as the mean."; "none"; null;
    [series(gauge("fvu"); run(""))]),
  panel("L0"; "Active latents per token."; "none"; null; [series(gauge("l0"); run(""))]),
  panel("Dead latents"; "Share of the latents that have been silent for sae.dead_after_tokens."; "percentunit"; 1;
    [series(gauge("dead_fraction"); run(""))]),
  panel("Steps per second"; "Over five minutes, waits included; and over half a minute, without waits for rounds."; "none"; null;
    [series("max by (run) (deriv(ray_sae_ray_step\(of_run)[5m]))"; run(" over 5 min")),
     series(gauge("steps_per_s"); run(""))]),
  panel("Step"; "Of the last trained window."; "none"; null; [series(gauge("step"); run(""))]),
  panel("Rewards applied"; "Flat while steps go on: the credit loss acts on old rewards."; "none"; null;
    [series(gauge("rewards_applied"); run(""))]),
  panel("Explanations shared"; "Latents of the last round without credit: a close latent fits the same explanation better.";
    "none"; null; [series(gauge("explanations_shared"); run(""))])])
+ row("Who waits for whom"; [
  panel("Tokens per second"; "In balance both are alike; the slower side is the one that is waited for."; "none"; null;
    [series(gauge("trainer_tokens_per_s"); run(" trainer")),
     series(gauge("producer_tokens_per_s"); run(" producers"))]),
  panel("Trainer's wait for blocks"; "Longest wait of a rank in the last window."; "s"; null;
    [series(gauge("trainer_wait_s"); run(""))]),
  panel("Time spent waiting"; "Of the last minute: the trainer's for blocks, the producers' for a lease."; "percentunit"; 1;
    [series(gauge("trainer_wait_share"); run(" trainer")), series(gauge("producers_idle_share"); run(" producers"))]),
  panel("Producers"; "Ready: serve; their number moves where activations.producers is a range. Idle: no block is up for "
    + "a lease."; "none"; null;
    [series(gauge("producers_ready"); run(" ready")), series(gauge("producers_starting"); run(" starting")),
     series(gauge("producers_idle"); run(" idle"))]),
  panel("Blocks"; "Held: produced and not yet trained. Leased and none held: the producers are behind."; "none"; null;
    [series(gauge("blocks_held"); run(" held")), series(gauge("blocks_leased"); run(" leased"))]),
  panel("Texts that wait for a verdict"; "The reward desk's backlog."; "none"; null;
    [series(gauge("judge_queue"); run(""))]),
  panel("Verdicts per second"; "As the desk counts them, and over ten minutes."; "none"; null;
    [series(gauge("verdicts_per_s"); run("")),
     series("max by (run) (deriv(ray_sae_ray_verdicts\(of_run)[10m]))"; run(" over 10 min"))]),
  panel("Age of the oldest lease and window"; "A lease: since its producer began. A window: since the ranks have it.";
    "s"; null;
    [series(gauge("oldest_lease_s"); run(" lease")), series(gauge("oldest_window_s"); run(" window"))]),
  panel("Windows in flight"; "Handed to the ranks and not trained."; "none"; null;
    [series(gauge("windows_in_flight"); run(""))]),
  panel("Training waits for"; "Seconds per second, over ten minutes: a save that is still being written, a judging round.";
    "percentunit"; null;
    [series("max by (run) (deriv(ray_sae_ray_save_wait_s\(of_run)[10m]))"; run(" a save")),
     series("max by (run) (deriv(ray_sae_ray_round_wait_s\(of_run)[10m]))"; run(" a round"))])])
+ row("Faults and commits"; [
  panel("Restarts"; "Generation: how often the trainer group was built again."; "none"; null;
    [series(gauge("generation"); run(" generation")), series(gauge("producer_restarts"); run(" producers"))]),
  panel("Blocks once more"; "Leases that were issued again; blocks that came twice and were dropped."; "none"; null;
    [series(gauge("blocks_reissued"); run(" reissued")), series(gauge("blocks_duplicate"); run(" duplicate"))]),
  panel("Steps that a failure would cost"; "Trained since the last commit."; "none"; null;
    [series(gauge("uncommitted_steps"); run(""))]),
  panel("Commits"; "Age of the last one, and of the save that is being written."; "s"; null;
    [series(gauge("commit_age_s"); run(" last commit")), series(gauge("save_age_s"); run(" save"))]),
  panel("S3 requests per second"; "Of all processes of the run, and what of them were retries."; "none"; null;
    [series(s3("requests"); run("")), series(s3("retries"); run(" retries"))]),
  panel("S3 bytes per second"; "Read and written."; "Bps"; null;
    [series(s3("read_bytes"); run(" read")), series(s3("written_bytes"); run(" written"))]),
  panel("Seconds of an S3 action"; "95% of them took less, retries included."; "s"; null;
    [series("histogram_quantile(0.95, sum by (run, action, le) "
      + "(rate(ray_sae_ray_s3_seconds_bucket\(of_run)[$__rate_interval])))"; "{{run}} {{action}}")]),
  panel("S3 objects that were refused"; "Corrupt: torn, or not what was committed. Unconditional: commits where the "
    + "endpoint knows no conditions, so that two runs would not notice each other."; "none"; null;
    [series(s3("corrupt"); run(" corrupt")), series(s3("unconditional"); run(" unconditional"))])])
+ row("Age of judgements"; [
  panel("Age of rewards"; "Steps trained since the applied rewards were judged."; "none"; null;
    [series(gauge("reward_age_steps"); run(""))]),
  panel("Open round"; "Steps trained since it was asked for, and rounds applied."; "none"; null;
    [series(gauge("round_steps_ahead"); run(" steps ahead")), series(gauge("rounds_done"); run(" rounds done"))]),
  panel("Age of verdicts"; "Round: since it was asked for. Verdict: since the last one, while some are waited for. Backlog: "
    + "since nothing waited."; "s"; null;
    [series(gauge("round_age_s"); run(" round")), series(gauge("verdict_age_s"); run(" verdict")),
     series(gauge("judge_backlog_s"); run(" backlog"))])])
+ row("Judge pool"; [
  panel("Replicas"; "Running, per role."; "none"; null; [series(level("replicas"); judge(""))]),
  panel("Replicas' time";
    "Busy: at least one request was with the engine. Stepping: its workers executed a batch. What lies between is "
    + "scheduling, messages between processes, or a core that others use."; "percentunit"; 1;
    [series(level("busy_share"); judge(" busy")), series(level("step_share"); judge(" stepping"))]),
  panel("Calls"; "Open: with a replica. Queued: waiting for one of the caller's own slots."; "none"; null;
    [series(total("open_calls"); judge(" open")), series(total("queued_calls"); judge(" queued")),
     series(total("running"); judge(" readings"))]),
  panel("Seconds of a call"; "From its slot to its answer, retries included."; "s"; null;
    [series(quantile("0.5"); judge(" median")), series(quantile("0.95"); judge(" 95%"))]),
  panel("Readings per second"; "Answered, answered without a number, given up."; "none"; null;
    [series(rate("done"); judge(" done")), series(rate("unreadable"); judge(" unreadable")),
     series(rate("failed"); judge(" failed"))]),
  panel("Put off and asked again"; "Calls that full queues refused; calls that failed and were repeated."; "none"; null;
    [series(rate("back_pressure"); judge(" put off")), series(rate("retries"); judge(" asked again"))]),
  panel("Judges' tokens per second"; "Prompts, what of them a prefix cache held, and output."; "none"; null;
    [series(rate("prompt_tokens"); judge(" prompt")), series(rate("cached_tokens"); judge(" cached")),
     series(rate("output_tokens"); judge(" output"))]),
  panel("Readings that were known"; "Answered by memory and by the verdict cache on disk."; "none"; null;
    [series(rate("cache_hits"); judge(" memory")), series(rate("disk_hits"); judge(" disk"))])])
) as $panels
| {title: "sae_ray", uid: "sae-ray", tags: ["ray", "sae_ray"], schemaVersion: 41, version: 1, editable: false,
   refresh: "30s", time: {from: "now-3h", to: "now"}, timezone: "browser", annotations: {list: []}, graphTooltip: 1,
   templating: {list: [
     {name: "datasource", type: "datasource", query: "prometheus", label: "data source", current: {}},
     variable("run"; "run"; "ray_sae_ray_step"; "run"),
     variable("role"; "judge"; "ray_sae_ray_pool_open_calls"; "role")]},
   panels: ($panels | placed)}
