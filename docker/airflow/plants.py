from plant_mlops.targets.airflow import dags; globals().update(dags())
