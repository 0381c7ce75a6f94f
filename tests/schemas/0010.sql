BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0010');
CREATE TABLE captions (
	job_id INTEGER NOT NULL, 
	lease_id INTEGER, 
	text TEXT NOT NULL, 
	flags TEXT DEFAULT '' NOT NULL, 
	finish_reason TEXT, 
	prompt_tokens INTEGER, 
	new_tokens INTEGER, 
	processing_ms REAL, 
	latency_ms REAL, 
	batch_size INTEGER, 
	generated_at INTEGER NOT NULL, 
	CONSTRAINT pk_captions PRIMARY KEY (job_id), 
	CONSTRAINT fk_captions_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT fk_captions_lease_id_leases FOREIGN KEY(lease_id) REFERENCES leases (id)
)
 STRICT

;
INSERT INTO "captions" VALUES(1,1,'28 by 28, grey 0','','stop',0,3,1.0,0.0,1,1795520493957);
INSERT INTO "captions" VALUES(2,1,'29 by 29, grey 1','','stop',0,3,1.0,0.0,1,1795520493957);
INSERT INTO "captions" VALUES(4,1,'31 by 31, grey 3','','stop',0,3,1.0,0.0,1,1795520493957);
INSERT INTO "captions" VALUES(5,2,'32 by 32, grey 4','','stop',0,3,1.0,0.0,1,1795520494007);
INSERT INTO "captions" VALUES(7,2,'34 by 29, grey 6','','stop',0,3,1.0,0.0,1,1795520494007);
INSERT INTO "captions" VALUES(8,2,'28 by 30, grey 7','','stop',0,3,1.0,0.0,1,1795520494007);
INSERT INTO "captions" VALUES(9,3,'29 by 31, grey 8','','stop',0,3,1.0,0.0,1,1795520494023);
CREATE TABLE datasets (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	revision TEXT NOT NULL, columns TEXT, 
	CONSTRAINT pk_datasets PRIMARY KEY (id), 
	CONSTRAINT uq_datasets_name_revision UNIQUE (name, revision)
)
 STRICT

;
INSERT INTO "datasets" VALUES(1,'/data/set','',NULL);
CREATE TABLE edits (
	id INTEGER NOT NULL, 
	uuid TEXT NOT NULL, 
	job_id INTEGER NOT NULL, 
	reader TEXT NOT NULL, 
	text TEXT NOT NULL, 
	previous TEXT NOT NULL, 
	undoes INTEGER, 
	act TEXT, 
	at INTEGER NOT NULL, 
	CONSTRAINT pk_edits PRIMARY KEY (id), 
	CONSTRAINT fk_edits_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT fk_edits_undoes_edits FOREIGN KEY(undoes) REFERENCES edits (id), 
	CONSTRAINT uq_edits_uuid UNIQUE (uuid)
)
 STRICT

;
INSERT INTO "edits" VALUES(1,'1c2d3e4f5a6b4c7d8e9f0a1b2c3d4e5f',1,'ann','A corrected caption.','28 by 28, grey 0',NULL,NULL,1795520501000);
INSERT INTO "edits" VALUES(2,'2c2d3e4f5a6b4c7d8e9f0a1b2c3d4e5f',1,'bob','28 by 28, grey 0','A corrected caption.',1,NULL,1795520502000);
CREATE TABLE failures (
	id INTEGER NOT NULL, 
	job_id INTEGER NOT NULL, 
	lease_id INTEGER, 
	code TEXT NOT NULL, 
	message TEXT NOT NULL, 
	at INTEGER NOT NULL, 
	CONSTRAINT pk_failures PRIMARY KEY (id), 
	CONSTRAINT fk_failures_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT fk_failures_lease_id_leases FOREIGN KEY(lease_id) REFERENCES leases (id)
)
 STRICT

;
INSERT INTO "failures" VALUES(1,3,1,'unprocessable','The small engine cannot take this picture.',1795520493958);
INSERT INTO "failures" VALUES(2,6,2,'busy','Come back later.',1795520494008);
CREATE TABLE image_hashes (
	image_id INTEGER NOT NULL, 
	algorithm TEXT NOT NULL, 
	hash TEXT NOT NULL, 
	CONSTRAINT pk_image_hashes PRIMARY KEY (image_id, algorithm), 
	CONSTRAINT fk_image_hashes_image_id_images FOREIGN KEY(image_id) REFERENCES images (id)
)
 STRICT

;
INSERT INTO "image_hashes" VALUES(1,'dhash-16','0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef');
INSERT INTO "image_hashes" VALUES(2,'dhash-16','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff');
CREATE TABLE images (
	id INTEGER NOT NULL, 
	dataset_id INTEGER NOT NULL, 
	split TEXT NOT NULL, 
	image_id TEXT NOT NULL, 
	shard_id INTEGER NOT NULL, 
	row_group INTEGER NOT NULL, 
	row_in_group INTEGER NOT NULL, 
	caption TEXT NOT NULL, 
	cui TEXT NOT NULL, 
	CONSTRAINT pk_images PRIMARY KEY (id), 
	CONSTRAINT fk_images_dataset_id_datasets FOREIGN KEY(dataset_id) REFERENCES datasets (id), 
	CONSTRAINT fk_images_shard_id_shards FOREIGN KEY(shard_id) REFERENCES shards (id), 
	CONSTRAINT uq_images_dataset_id_split_image_id UNIQUE (dataset_id, split, image_id)
)
 STRICT

;
INSERT INTO "images" VALUES(1,1,'train','train_00000',1,0,0,'Original caption 0.','C0040405');
INSERT INTO "images" VALUES(2,1,'train','train_00001',1,0,1,'Original caption 1.','C0040405');
INSERT INTO "images" VALUES(3,1,'train','train_00002',1,0,2,'Original caption 2.','C0040405');
INSERT INTO "images" VALUES(4,1,'train','train_00003',1,0,3,'Original caption 3.','C0040405');
INSERT INTO "images" VALUES(5,1,'train','train_00004',1,0,4,'Original caption 4.','C0040405');
INSERT INTO "images" VALUES(6,1,'train','train_00005',1,0,5,'Original caption 5.','C0040405');
INSERT INTO "images" VALUES(7,1,'train','train_00006',1,0,6,'Original caption 6.','C0040405');
INSERT INTO "images" VALUES(8,1,'train','train_00007',1,0,7,'Original caption 7.','C0040405');
INSERT INTO "images" VALUES(9,1,'train','train_00008',1,0,8,'Original caption 8.','C0040405');
INSERT INTO "images" VALUES(10,1,'train','train_00009',1,0,9,'Original caption 9.','C0040405');
INSERT INTO "images" VALUES(11,1,'train','train_00010',1,1,0,'Original caption 10.','C0040405');
INSERT INTO "images" VALUES(12,1,'train','train_00011',1,1,1,'Original caption 11.','C0040405');
INSERT INTO "images" VALUES(13,1,'train','train_00012',1,1,2,'Original caption 12.','C0040405');
INSERT INTO "images" VALUES(14,1,'train','train_00013',1,1,3,'Original caption 13.','C0040405');
INSERT INTO "images" VALUES(15,1,'train','train_00014',1,1,4,'Original caption 14.','C0040405');
INSERT INTO "images" VALUES(16,1,'train','train_00015',1,1,5,'Original caption 15.','C0040405');
INSERT INTO "images" VALUES(17,1,'train','train_00016',1,1,6,'Original caption 16.','C0040405');
INSERT INTO "images" VALUES(18,1,'train','train_00017',1,1,7,'Original caption 17.','C0040405');
INSERT INTO "images" VALUES(19,1,'train','train_00018',1,1,8,'Original caption 18.','C0040405');
INSERT INTO "images" VALUES(20,1,'train','train_00019',1,1,9,'Original caption 19.','C0040405');
INSERT INTO "images" VALUES(21,1,'train','train_00020',1,2,0,'Original caption 20.','C0040405');
INSERT INTO "images" VALUES(22,1,'train','train_00021',1,2,1,'Original caption 21.','C0040405');
INSERT INTO "images" VALUES(23,1,'train','train_00022',1,2,2,'Original caption 22.','C0040405');
INSERT INTO "images" VALUES(24,1,'train','train_00023',1,2,3,'Original caption 23.','C0040405');
INSERT INTO "images" VALUES(25,1,'train','train_00024',1,2,4,'Original caption 24.','C0040405');
INSERT INTO "images" VALUES(26,1,'train','train_00025',1,2,5,'Original caption 25.','C0040405');
INSERT INTO "images" VALUES(27,1,'train','train_00026',1,2,6,'Original caption 26.','C0040405');
INSERT INTO "images" VALUES(28,1,'train','train_00027',1,2,7,'Original caption 27.','C0040405');
INSERT INTO "images" VALUES(29,1,'train','train_00028',1,2,8,'Original caption 28.','C0040405');
INSERT INTO "images" VALUES(30,1,'train','train_00029',1,2,9,'Original caption 29.','C0040405');
CREATE TABLE jobs (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	image_id INTEGER NOT NULL, 
	split TEXT NOT NULL, 
	status TEXT DEFAULT 'pending' NOT NULL, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	crashes INTEGER DEFAULT '0' NOT NULL, 
	solo_crashes INTEGER DEFAULT '0' NOT NULL, 
	lease_id INTEGER, 
	not_before INTEGER, 
	finished_at INTEGER, 
	checkpoint INTEGER, 
	CONSTRAINT pk_jobs PRIMARY KEY (id), 
	CONSTRAINT ck_jobs_lease CHECK ((status = 'leased') = (lease_id IS NOT NULL)), 
	CONSTRAINT ck_jobs_not_before CHECK ((status = 'waiting') = (not_before IS NOT NULL)), 
	CONSTRAINT ck_jobs_finished_at CHECK ((status IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL)), 
	CONSTRAINT ck_jobs_checkpoint CHECK (checkpoint IS NULL OR status = 'done'), 
	CONSTRAINT ck_jobs_status CHECK (status IN ('pending', 'leased', 'waiting', 'done', 'failed', 'cancelled')), 
	CONSTRAINT fk_jobs_image_id_images FOREIGN KEY(image_id) REFERENCES images (id), 
	CONSTRAINT fk_jobs_lease_id_leases FOREIGN KEY(lease_id) REFERENCES leases (id), 
	CONSTRAINT fk_jobs_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id), 
	CONSTRAINT uq_jobs_run_id_image_id UNIQUE (run_id, image_id)
)
 STRICT

;
INSERT INTO "jobs" VALUES(1,1,1,'train','done',1,0,0,NULL,NULL,1795520493957,NULL);
INSERT INTO "jobs" VALUES(2,1,2,'train','done',1,0,0,NULL,NULL,1795520493957,NULL);
INSERT INTO "jobs" VALUES(3,1,3,'train','failed',1,0,0,NULL,NULL,1795520493958,NULL);
INSERT INTO "jobs" VALUES(4,1,4,'train','done',1,0,0,NULL,NULL,1795520493957,NULL);
INSERT INTO "jobs" VALUES(5,1,5,'train','done',1,0,0,NULL,NULL,1795520494007,NULL);
INSERT INTO "jobs" VALUES(6,1,6,'train','waiting',1,0,0,NULL,1795520497768,NULL,NULL);
INSERT INTO "jobs" VALUES(7,1,7,'train','done',1,0,0,NULL,NULL,1795520494007,NULL);
INSERT INTO "jobs" VALUES(8,1,8,'train','done',1,0,0,NULL,NULL,1795520494007,NULL);
INSERT INTO "jobs" VALUES(9,1,9,'train','done',1,0,0,NULL,NULL,1795520494023,NULL);
INSERT INTO "jobs" VALUES(10,1,10,'train','pending',0,1,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(11,1,11,'train','pending',0,1,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(12,1,12,'train','pending',0,1,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(13,1,13,'train','leased',1,0,0,4,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(14,1,14,'train','leased',1,0,0,4,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(15,1,15,'train','leased',1,0,0,4,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(16,1,16,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(17,1,17,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(18,1,18,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(19,1,19,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(20,1,20,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(21,1,21,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(22,1,22,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(23,1,23,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(24,1,24,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(25,1,25,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(26,1,26,'train','cancelled',0,0,0,NULL,NULL,1795520494123,NULL);
INSERT INTO "jobs" VALUES(27,1,27,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(28,1,28,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(29,1,29,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(30,1,30,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(31,2,1,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(32,2,2,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(33,2,3,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(34,2,4,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(35,2,5,'train','pending',0,0,0,NULL,NULL,NULL,NULL);
CREATE TABLE leases (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	worker_id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	split TEXT NOT NULL, 
	lane INTEGER NOT NULL, 
	state TEXT NOT NULL, 
	n_jobs INTEGER NOT NULL, 
	n_done INTEGER DEFAULT '0' NOT NULL, 
	claimed_at INTEGER NOT NULL, 
	beat_at INTEGER NOT NULL, 
	expires_at INTEGER NOT NULL, 
	closed_at INTEGER, 
	load_ms REAL DEFAULT '0' NOT NULL, 
	prepare_ms REAL DEFAULT '0' NOT NULL, 
	prefill_ms REAL DEFAULT '0' NOT NULL, 
	decode_ms REAL DEFAULT '0' NOT NULL, 
	store_ms REAL DEFAULT '0' NOT NULL, origin_uuid TEXT, origin_id INTEGER, 
	CONSTRAINT ck_leases_closed CHECK ((state = 'open') = (closed_at IS NULL)), 
	CONSTRAINT ck_leases_state CHECK (state IN ('open', 'closed', 'released', 'expired')), 
	CONSTRAINT fk_leases_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id), 
	CONSTRAINT fk_leases_worker_id_workers FOREIGN KEY(worker_id) REFERENCES workers (id)
)
 STRICT

;
INSERT INTO "leases" VALUES(1,1,1,'train',0,'closed',4,3,1795520493898,1795520493958,1795520553898,1795520493958,1.53908659995067864656e+01,1.79995000507915392518e-01,0.0,3.0,5.25,NULL,NULL);
INSERT INTO "leases" VALUES(2,1,1,'train',0,'closed',4,3,1795520493936,1795520494008,1795520553936,1795520494008,4.03894700139062479138e+00,2.72844001301564276218e-01,0.0,3.0,6.25,'another',7);
INSERT INTO "leases" VALUES(3,1,1,'train',0,'expired',4,1,1795520493988,1795520494023,1795520553988,1795520494048,5.11881800048286095261e+00,2.49338998401071876287e-01,0.0,1.0,7.25,NULL,NULL);
INSERT INTO "leases" VALUES(4,2,1,'train',0,'open',3,0,1795520494122,1795520494122,1795520495122,NULL,0.0,0.0,0.0,0.0,0.0,NULL,NULL);
CREATE TABLE parts (
	run_id INTEGER NOT NULL, 
	split TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	n_parts INTEGER NOT NULL, 
	CONSTRAINT pk_parts PRIMARY KEY (run_id, split, number, n_parts), 
	CONSTRAINT fk_parts_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id)
)
 STRICT

;
INSERT INTO "parts" VALUES(1,'train',1,2);
CREATE TABLE ratings (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	reader_number INTEGER NOT NULL, 
	position INTEGER NOT NULL, 
	answers TEXT NOT NULL, 
	shown_at INTEGER NOT NULL, 
	at INTEGER NOT NULL, 
	CONSTRAINT pk_ratings PRIMARY KEY (id), 
	CONSTRAINT ck_ratings_shown_at CHECK (at >= shown_at), 
	CONSTRAINT fk_ratings_study_id_studies FOREIGN KEY(study_id) REFERENCES studies (id)
)
 STRICT

;
INSERT INTO "ratings" VALUES(1,1,1,1,'{"preference": 1}',1795520500000,1795520509000);
CREATE TABLE reviews (
	id INTEGER NOT NULL, 
	uuid TEXT NOT NULL, 
	job_id INTEGER NOT NULL, 
	reader TEXT NOT NULL, 
	verdict TEXT NOT NULL, 
	errors TEXT DEFAULT '' NOT NULL, 
	note TEXT DEFAULT '' NOT NULL, 
	at INTEGER NOT NULL, 
	CONSTRAINT pk_reviews PRIMARY KEY (id), 
	CONSTRAINT ck_reviews_verdict CHECK (verdict IN ('correct', 'minor', 'major', 'unusable')), 
	CONSTRAINT fk_reviews_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT uq_reviews_uuid UNIQUE (uuid)
)
 STRICT

;
INSERT INTO "reviews" VALUES(1,'0d5f4b5c9a1e4c0f8d2b6a7c3e9f1a2b',1,'ann','minor','side','It is the left lung.',1795520500000);
CREATE TABLE runs (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	dataset_id INTEGER NOT NULL, 
	recipe TEXT NOT NULL, 
	recipe_hash TEXT NOT NULL, 
	resolved TEXT, 
	max_attempts INTEGER DEFAULT '5' NOT NULL, 
	paused INTEGER DEFAULT '0' NOT NULL, 
	created_at INTEGER NOT NULL, deleted_at INTEGER, 
	CONSTRAINT pk_runs PRIMARY KEY (id), 
	CONSTRAINT fk_runs_dataset_id_datasets FOREIGN KEY(dataset_id) REFERENCES datasets (id), 
	CONSTRAINT uq_runs_name UNIQUE (name)
)
 STRICT

;
INSERT INTO "runs" VALUES(1,'default',1,'{"adapter": null, "do_sample": false, "dtype": "auto", "max_new_tokens": 256, "max_pixels": 1003520, "min_pixels": 3136, "model": "tests/small", "num_beams": 1, "prompt": "Describe this medical image in detail.", "repetition_penalty": 1.0, "revision": "main", "temperature": null, "top_k": null, "top_p": null}','a91bce85763ba9b44853cd6c841db221ca985cb4ec3cd507ef0eeec09b4df602','{"digest": "small", "dtype": "none", "engine": "small", "revision": ""}',5,0,1795520493814,NULL);
INSERT INTO "runs" VALUES(2,'other',1,'{"adapter": null, "do_sample": false, "dtype": "auto", "max_new_tokens": 256, "max_pixels": 1003520, "min_pixels": 3136, "model": "tests/small", "num_beams": 1, "prompt": "What?", "repetition_penalty": 1.0, "revision": "main", "temperature": null, "top_k": null, "top_p": null}','09dff134355da114271513f80e73d3ee7aa03195075d67dd685deaf9dbb45dce',NULL,5,0,1795520494140,NULL);
CREATE TABLE scores (
	job_id INTEGER NOT NULL, 
	metric TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	value TEXT NOT NULL, 
	CONSTRAINT pk_scores PRIMARY KEY (job_id, metric), 
	CONSTRAINT fk_scores_job_id_captions FOREIGN KEY(job_id) REFERENCES captions (job_id)
)
 STRICT

;
INSERT INTO "scores" VALUES(1,'cider_d','0f3a','{"cider_d": 1.25}');
CREATE TABLE shards (
	id INTEGER NOT NULL, 
	dataset_id INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	split TEXT NOT NULL, 
	n_rows INTEGER NOT NULL, 
	n_row_groups INTEGER NOT NULL, 
	size INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	CONSTRAINT pk_shards PRIMARY KEY (id), 
	CONSTRAINT fk_shards_dataset_id_datasets FOREIGN KEY(dataset_id) REFERENCES datasets (id), 
	CONSTRAINT uq_shards_dataset_id_path UNIQUE (dataset_id, path)
)
 STRICT

;
INSERT INTO "shards" VALUES(1,1,'data/train-00000-of-00001.parquet','train',30,3,6195,'2fe43c0a045610bea81efd596b8a9ff19c4410f827509e1a9f740dc68c8c6484');
CREATE TABLE studies (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	split TEXT NOT NULL, 
	n_pictures INTEGER NOT NULL, 
	n_readers INTEGER NOT NULL, 
	seed INTEGER NOT NULL, 
	form TEXT NOT NULL, 
	created_at INTEGER NOT NULL, 
	CONSTRAINT pk_studies PRIMARY KEY (id), 
	CONSTRAINT uq_studies_name UNIQUE (name)
)
 STRICT

;
INSERT INTO "studies" VALUES(1,'one','train',1,1,7,'{}',1795520500000);
CREATE TABLE study_items (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	reader_number INTEGER NOT NULL, 
	position INTEGER NOT NULL, 
	place INTEGER NOT NULL, 
	image_id INTEGER NOT NULL, 
	modality TEXT NOT NULL, 
	job_id INTEGER, 
	CONSTRAINT pk_study_items PRIMARY KEY (id), 
	CONSTRAINT fk_study_items_study_id_studies FOREIGN KEY(study_id) REFERENCES studies (id), 
	CONSTRAINT fk_study_items_image_id_images FOREIGN KEY(image_id) REFERENCES images (id), 
	CONSTRAINT fk_study_items_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT uq_study_items_study_id_reader_number_position_place UNIQUE (study_id, reader_number, position, place)
)
 STRICT

;
INSERT INTO "study_items" VALUES(1,1,1,1,1,2,'CT',2);
INSERT INTO "study_items" VALUES(2,1,1,1,2,2,'CT',NULL);
CREATE TABLE study_readers (
	study_id INTEGER NOT NULL, 
	reader_number INTEGER NOT NULL, 
	reader TEXT NOT NULL, 
	joined_at INTEGER NOT NULL, 
	CONSTRAINT pk_study_readers PRIMARY KEY (study_id, reader_number), 
	CONSTRAINT fk_study_readers_study_id_studies FOREIGN KEY(study_id) REFERENCES studies (id), 
	CONSTRAINT uq_study_readers_study_id_reader UNIQUE (study_id, reader)
)
 STRICT

;
INSERT INTO "study_readers" VALUES(1,1,'ann',1795520500000);
CREATE TABLE tallies (
	run_id INTEGER NOT NULL, 
	split TEXT NOT NULL, 
	status TEXT NOT NULL, 
	slot INTEGER NOT NULL, 
	n INTEGER NOT NULL, 
	CONSTRAINT pk_tallies PRIMARY KEY (run_id, split, status, slot), 
	CONSTRAINT fk_tallies_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id)
)
 STRICT

;
INSERT INTO "tallies" VALUES(1,'train','pending',0,29);
INSERT INTO "tallies" VALUES(1,'train','leased',1,0);
INSERT INTO "tallies" VALUES(1,'train','pending',1,-4);
INSERT INTO "tallies" VALUES(1,'train','leased',2,0);
INSERT INTO "tallies" VALUES(1,'train','pending',2,-4);
INSERT INTO "tallies" VALUES(1,'train','done',1,3);
INSERT INTO "tallies" VALUES(1,'train','failed',1,1);
INSERT INTO "tallies" VALUES(1,'train','leased',3,0);
INSERT INTO "tallies" VALUES(1,'train','pending',3,-1);
INSERT INTO "tallies" VALUES(1,'train','done',2,3);
INSERT INTO "tallies" VALUES(1,'train','waiting',2,1);
INSERT INTO "tallies" VALUES(1,'train','done',3,1);
INSERT INTO "tallies" VALUES(1,'train','leased',4,3);
INSERT INTO "tallies" VALUES(1,'train','pending',4,-3);
INSERT INTO "tallies" VALUES(1,'train','cancelled',0,1);
INSERT INTO "tallies" VALUES(2,'train','pending',0,5);
CREATE TABLE unblindings (
	study_id INTEGER NOT NULL, 
	reader TEXT NOT NULL, 
	n_missing INTEGER NOT NULL, 
	at INTEGER NOT NULL, 
	CONSTRAINT pk_unblindings PRIMARY KEY (study_id), 
	CONSTRAINT fk_unblindings_study_id_studies FOREIGN KEY(study_id) REFERENCES studies (id)
)
 STRICT

;
INSERT INTO "unblindings" VALUES(1,'ann',0,1795520509500);
CREATE TABLE workers (
	id INTEGER NOT NULL, 
	uuid TEXT NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	device TEXT NOT NULL, 
	engine TEXT NOT NULL, 
	versions TEXT NOT NULL, 
	self_check TEXT, 
	n_done INTEGER DEFAULT '0' NOT NULL, 
	started_at INTEGER NOT NULL, 
	seen_at INTEGER NOT NULL, 
	stopped_at INTEGER, telemetry TEXT, lease_ttl_ms INTEGER DEFAULT '120000' NOT NULL, 
	CONSTRAINT pk_workers PRIMARY KEY (id), 
	CONSTRAINT uq_workers_uuid UNIQUE (uuid)
)
 STRICT

;
INSERT INTO "workers" VALUES(1,'d7c19901d1a645408df749cdaeadc5b9','host',28862,'cpu','small','{"rococap": "0"}',NULL,7,1795520493881,1795520494103,1795520494103,'{"captioning_sec": 0.2, "pictures_per_sec": 35.0, "new_tokens_per_sec": 105.0, "fill": 0.917, "busy": 0.035, "waited_sec": 0.0, "batch_size": 4, "memory_mb": 81.3, "gpu_memory_mb": null, "gpu_memory_total_mb": null, "gpu_utilisation": null}',60000);
INSERT INTO "workers" VALUES(2,'dead','host',1,'cpu','small','{"rococap": "0"}',NULL,0,1795520494121,1795520494121,NULL,NULL,120000);
CREATE INDEX ix_leases_closed_at ON leases (closed_at);
CREATE INDEX ix_leases_expires_at ON leases (expires_at) WHERE state = 'open';
CREATE INDEX ix_jobs_checkpoint ON jobs (run_id, split, checkpoint) WHERE checkpoint IS NOT NULL;
CREATE INDEX ix_jobs_due ON jobs (run_id, split, finished_at) WHERE status = 'done' AND checkpoint IS NULL;
CREATE INDEX ix_jobs_failed ON jobs (run_id, split) WHERE status = 'failed';
CREATE INDEX ix_jobs_leased ON jobs (lease_id) WHERE lease_id IS NOT NULL;
CREATE INDEX ix_jobs_pending ON jobs (run_id, split, crashes, id) WHERE status = 'pending';
CREATE INDEX ix_jobs_waiting ON jobs (not_before) WHERE status = 'waiting';
CREATE INDEX ix_failures_job_id ON failures (job_id);
CREATE INDEX ix_reviews_job_id_at_uuid ON reviews (job_id, at, uuid);
CREATE INDEX ix_edits_job_id_at_uuid ON edits (job_id, at, uuid);
CREATE INDEX ix_edits_act ON edits (act) WHERE act IS NOT NULL;
CREATE INDEX ix_study_items_job_id ON study_items (job_id);
CREATE INDEX ix_ratings_study_id_reader_number_position ON ratings (study_id, reader_number, position);
CREATE UNIQUE INDEX ix_leases_origin ON leases (origin_uuid, origin_id) WHERE origin_id IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('leases',4);
COMMIT;
